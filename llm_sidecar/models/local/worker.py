"""The process that holds one engine: `python -m llm_sidecar.models.local.worker`.

It reads messages of `protocol` from standard input and writes the answers to the former standard
output. It ends when its input ends, so that no worker outlives its server.

A job passes through three threads: one reads it, one tokenizes its text, and the main thread
generates. Long texts have a tokenizing thread of their own. So generation never waits for the
tokenizer, and a short text never waits for a long one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Final

import msgspec

from llm_sidecar.engines import Delta, Engine
from llm_sidecar.engines.base import PREFILL_CHUNK, Batch, ChoiceScores, TokenLogprob
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, SidecarError, one_line
from llm_sidecar.logs import log_to_stderr
from llm_sidecar.models.local.cpu_limit import CpuLimit
from llm_sidecar.models.local.identity import load_identified
from llm_sidecar.models.local.out_of_memory import ended_first
from llm_sidecar.models.local.protocol import (
    FROM_SERVER,
    LOAD,
    Answer,
    Begun,
    Cancel,
    Check,
    Done,
    Failed,
    Generate,
    Job,
    LoadFailed,
    Prefill,
    Progress,
    PromptLogprobs,
    Ready,
    RequestJob,
    ScoreQuestions,
    Scores,
    encode,
)
from llm_sidecar.text import cleaned

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.02
"""Text is sent at most this often after the first token: one message per token would keep the
server's event loop busy."""
_LONG_LINE: Final = 8192
"""Messages of more bytes count as long; a typical request has a thousand."""
_TOKENIZING_SECONDS: Final = 10.0
"""Limit of CPU time for one chat; the slowest text of the default length takes a fiftieth of it."""


@dataclass(slots=True)
class _Completion:
    """The text generated for a job, and how much of it was sent.

    Attributes:
        unsent: text that has not been sent.
        logprobs: of its tokens.
        prompt_logprobs: those that have not been sent.
        tokens, sent_tokens: completion tokens so far.
        sent_at: when text was last sent.
    """

    unsent: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    sent_tokens: int = 0
    sent_at: float = 0.0


class Worker:
    """Serves one engine: jobs in order, up to its batch capacity at a time."""

    def __init__(self, inbox: IO[bytes], outbox: IO[bytes]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._short: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._tokenized: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._scores: dict[int, Generator[None, None, list[ChoiceScores]]] = {}
        self._scoring: set[int] = set()
        self._completions: dict[int, _Completion] = {}
        self._prefill: tuple[int, Generator[None]] | None = None

    def run(self) -> None:
        """Loads what the first line names, then serves until the input ends."""
        first = self._inbox.readline()
        if not first:
            # The server has ended, or does not need this worker any more.
            return
        load = LOAD.decode(first)
        log_to_stderr(load.log_format)
        # Before loading: the server may end meanwhile.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            # Another worker may serve while this one loads.
            with ended_first(with_children=True):
                engine, identity, speed = load_identified(load)
        except Exception as error:
            expected = isinstance(error, SidecarError)
            log.error("the model could not be loaded: %s", one_line(error), exc_info=not expected)
            permanent = isinstance(error, SidecarError | ValueError | LookupError)
            self._send(LoadFailed(one_line(error), permanent))
            return
        batch = engine.batch()
        self._send(Ready(identity, engine.context_length, batch.capacity, speed, engine.notes))
        for received in (self._short, self._long):
            arguments = (engine, received)
            threading.Thread(target=self._tokenize_all, args=arguments, daemon=True).start()
        self._serve_all(engine, batch)

    def _read(self) -> None:
        for line in self._inbox:
            message = FROM_SERVER.decode(line)
            if isinstance(message, Cancel):
                if not self._end_score(Done(id=message.id)):
                    # The id of a finished job stays in the set, which is harmless.
                    self._cancelled.add(message.id)
            else:
                is_long = isinstance(message, Prefill) or len(line) > _LONG_LINE
                (self._long if is_long else self._short).put(message)
        os._exit(0)

    def _tokenize_all(self, engine: Engine, received: queue.SimpleQueue[Job]) -> None:
        """Tokenizes the jobs received, and passes them on in the same order."""
        limit = CpuLimit(_TOKENIZING_SECONDS)
        with _ending_without_server():
            while True:
                job = received.get()
                if self._drop_cancelled(job.id):
                    continue
                if isinstance(job, Generate | ScoreQuestions):
                    # Sent first, so that the server does not pass the job to the next worker if
                    # this one crashes on it.
                    self._send(Begun(id=job.id))
                try:
                    job = _tokenized(engine, job, limit)
                except Exception as error:  # noqa: BLE001 - the packages raise bare ones
                    self._fail(job.id, error)
                    continue
                if isinstance(job, Check):
                    self._send(Done(id=job.id))
                else:
                    self._tokenized.put(job)

    def _serve_all(self, engine: Engine, batch: Batch) -> None:
        """Takes jobs in order. Steps of scores run between the steps of the batch, prefills while
        there is no other work."""
        while True:
            busy = batch or self._scores or self._prefill is not None
            try:
                job = self._tokenized.get(block=not busy)
            except queue.Empty:
                if batch:
                    self._step(batch)
                for number in tuple(self._scores):
                    self._continue_score(number)
                if not (batch or self._scores):
                    self._continue_prefill()
                continue
            match job:
                case Generate():
                    self._generate(batch, job)
                case ScoreQuestions():
                    self._begin_score(engine, job)
                case Prefill():
                    self._begin_prefill(engine, job)

    def _begin_prefill(self, engine: Engine, job: Prefill) -> None:
        if self._prefill is not None:
            # The new prefix replaces this one.
            number, steps = self._prefill
            steps.close()
            self._send(Done(id=number))
        self._prefill = job.id, engine.prefill(job.request)

    def _continue_prefill(self) -> None:
        if self._prefill is None:
            return
        number, steps = self._prefill
        try:
            next(steps)
        except StopIteration:
            self._send(Done(id=number))
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            # The type only: a runtime's message may quote the prompt.
            log.error("a prefix could not be prefilled: %s", type(error).__name__)
            self._send(Failed(id=number, detail=type(error).__name__))
        else:
            return
        self._prefill = None

    def _generate(self, batch: Batch, job: Generate) -> None:
        while len(batch) >= batch.capacity:
            self._step(batch)
        try:
            batch.add(job.id, job.request)
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            self._fail(job.id, error)
        else:
            self._completions[job.id] = _Completion()

    def _step(self, batch: Batch) -> None:
        """Generates one step of each completion in the batch, and sends text that is due."""
        try:
            deltas = batch.step()
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            for number in tuple(self._completions):
                del self._completions[number]
                self._fail(number, error)
            return
        now = time.monotonic()
        finished = {number for number, delta in deltas if self._progress(number, delta, now)}
        for number in self._completions.keys() & self._cancelled - finished:
            batch.remove(number)
            self._write(Done(id=number))
            finished.add(number)
        for number in finished:
            del self._completions[number]
            self._cancelled.discard(number)
        # In one write, so that the server reads them all at once.
        self._outbox.flush()

    def _progress(self, number: int, delta: Delta | Exception, now: float) -> bool:
        """Sends a completion's text if it is due, or its error; returns whether it has ended."""
        if isinstance(delta, Exception):
            self._fail(number, delta)
            return True
        completion = self._completions[number]
        completion.unsent += cleaned(delta.text)
        completion.logprobs += delta.logprobs
        completion.prompt_logprobs += delta.prompt_logprobs
        completion.tokens = delta.completion_tokens
        ends = delta.finish_reason is not None or number in self._cancelled
        read = completion.prompt_logprobs
        if len(read) >= PREFILL_CHUNK or (read and (ends or completion.tokens)):
            self._write(PromptLogprobs(id=number, tokens=tuple(read)))
            read.clear()
        if ends or (completion.tokens and now - completion.sent_at >= _FLUSH_SECONDS):
            self._write(
                Progress(
                    id=number,
                    text=completion.unsent,
                    prompt_tokens=delta.prompt_tokens,
                    completion_tokens=completion.tokens,
                    cached_tokens=delta.cached_tokens,
                    new_tokens=completion.tokens - completion.sent_tokens,
                    finish_reason=delta.finish_reason,
                    logprobs=tuple(completion.logprobs),
                )
            )
            completion.logprobs.clear()
            completion.unsent, completion.sent_tokens = "", completion.tokens
            completion.sent_at = now
        return delta.finish_reason is not None

    def _begin_score(self, engine: Engine, job: ScoreQuestions) -> None:
        if self._drop_cancelled(job.id):
            return
        steps = engine.score_questions(job.questions)
        if engine.scores_in_parallel:
            self._scoring.add(job.id)
            arguments = (job.id, steps)
            threading.Thread(target=self._score_in_parallel, args=arguments, daemon=True).start()
        else:
            self._scores[job.id] = steps
            # A score with one step does not wait for the batch.
            self._continue_score(job.id)

    def _continue_score(self, number: int) -> None:
        """Takes the next step of a score, and sends the result after the last one."""
        steps = self._scores[number]
        if self._drop_cancelled(number):
            steps.close()
        elif (answer := _next_step(number, steps)) is not None:
            self._send(answer)
            self._cancelled.discard(number)
        else:
            return
        del self._scores[number]

    def _score_in_parallel(
        self, number: int, steps: Generator[None, None, list[ChoiceScores]]
    ) -> None:
        with contextlib.closing(steps), _ending_without_server():
            while number in self._scoring:
                if (answer := _next_step(number, steps)) is not None:
                    self._end_score(answer)

    def _end_score(self, answer: Answer) -> bool:
        """Sends the answer unless the job has ended; returns whether it was sent."""
        try:
            # Of two threads, only one can remove it.
            self._scoring.remove(answer.id)
        except KeyError:
            return False
        self._send(answer)
        return True

    def _drop_cancelled(self, number: int) -> bool:
        """Ends a job if it was cancelled; returns whether it was."""
        if number not in self._cancelled:
            return False
        self._cancelled.discard(number)
        self._send(Done(id=number))
        return True

    def _fail(self, number: int, error: Exception) -> None:
        self._send(_failed(number, error))

    def _send(self, message: msgspec.Struct) -> None:
        self._write(message)
        self._outbox.flush()

    def _write(self, message: msgspec.Struct) -> None:
        self._outbox.write(encode(message))


def _tokenized(engine: Engine, job: Job, limit: CpuLimit) -> Job:
    """The job with its text as tokens; the limit holds for each chat."""
    if isinstance(job, ScoreQuestions):
        questions = []
        for question in job.questions:
            with limit:
                tokens = engine.tokenize(question.request)
            questions.append(question._replace(tokens=tokens))
        return msgspec.structs.replace(job, questions=questions)
    assert isinstance(job, RequestJob)
    with limit:
        # A prefix does not include the header of the assistant's turn.
        tokens = engine.tokenize(job.request, not isinstance(job, Prefill))
    most = job.request.most_tokens(len(tokens), engine.context_length)
    request = replace(job.request, tokens=tokens, max_tokens=most)
    return msgspec.structs.replace(job, request=request)


def _next_step(
    number: int, steps: Generator[None, None, list[ChoiceScores]]
) -> Scores | Failed | None:
    """The answer to the job if this was its last step, else None."""
    try:
        next(steps)
    except StopIteration as end:
        scores: list[ChoiceScores] = end.value
        values = (value for one in scores for value in one.probabilities.values())
        if all(map(math.isfinite, values)):
            return Scores(id=number, scores=scores)
        # JSON has no infinity and no NaN.
        return _failed(number, ModelUnavailable("its probabilities are not finite numbers"))
    except Exception as error:  # noqa: BLE001 - the runtimes raise bare exceptions
        return _failed(number, error)
    return None


def _failed(number: int, error: Exception) -> Failed:
    """Logs that a job has failed, and reports it with the reason if that is known."""
    if isinstance(error, InvalidRequest):
        return Failed(
            id=number,
            detail=error.problem,
            invalid=True,
            field=error.field,
            exceeds_context=error.exceeds_context,
        )
    if isinstance(error, SidecarError):
        log.error("a request failed: %s", error.detail)
        return Failed(id=number, detail=error.detail)
    # Only the type and the location: a runtime's message may quote the prompt.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed in the engine: %s\n%s", type(error).__name__, where)
    return Failed(id=number, detail=type(error).__name__)


@contextlib.contextmanager
def _ending_without_server() -> Iterator[None]:
    """Ends this process when the server, which reads its output, has ended."""
    try:
        yield
    except BrokenPipeError:
        os._exit(0)


def main() -> None:
    """Runs a worker on the standard streams; output of `print` goes to standard error instead."""
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with _ending_without_server():
        Worker(sys.stdin.buffer, outbox).run()


if __name__ == "__main__":
    main()
