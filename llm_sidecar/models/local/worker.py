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
from dataclasses import dataclass, replace
from typing import IO, Final

import msgspec

from llm_sidecar.engines import Delta, Engine
from llm_sidecar.engines.base import Batch
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
    Ready,
    ScoreChoices,
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
        tokens, sent_tokens: completion tokens so far.
        sent_at: when text was last sent.
    """

    unsent: str = ""
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
                if isinstance(job, Generate | ScoreChoices):
                    # Sent first, so that the server does not pass the job to the next worker if
                    # this one crashes on it.
                    self._send(Begun(id=job.id))
                try:
                    with limit:
                        # A prefix does not include the header of the assistant's turn.
                        tokens = engine.tokenize(job.request, not isinstance(job, Prefill))
                except Exception as error:  # noqa: BLE001 - the packages raise bare ones
                    self._fail(job.id, error)
                    continue
                if isinstance(job, Check):
                    self._send(Done(id=job.id))
                else:
                    request = replace(job.request, tokens=tokens)
                    self._tokenized.put(msgspec.structs.replace(job, request=request))

    def _serve_all(self, engine: Engine, batch: Batch) -> None:
        """Takes jobs in order, generates in a batch, and prefills while there is nothing else."""
        while True:
            try:
                job = self._tokenized.get(block=not batch and self._prefill is None)
            except queue.Empty:
                if batch:
                    self._step(batch)
                else:
                    self._continue_prefill()
                continue
            match job:
                case Generate():
                    self._generate(batch, job)
                case ScoreChoices():
                    self._score(engine, job)
                case Prefill():
                    self._begin_prefill(engine, job)

    def _begin_prefill(self, engine: Engine, job: Job) -> None:
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

    def _generate(self, batch: Batch, job: Job) -> None:
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

    def _progress(self, number: int, delta: Delta, now: float) -> bool:
        """Sends the text of a completion if it is due; returns whether the completion finished."""
        completion = self._completions[number]
        completion.unsent += cleaned(delta.text)
        completion.tokens = delta.completion_tokens
        ends = delta.finish_reason is not None or number in self._cancelled
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
                )
            )
            completion.unsent, completion.sent_tokens = "", completion.tokens
            completion.sent_at = now
        return delta.finish_reason is not None

    def _score(self, engine: Engine, job: ScoreChoices) -> None:
        if self._drop_cancelled(job.id):
            return
        if engine.scores_in_parallel:
            self._scoring.add(job.id)
            arguments = (engine, job)
            threading.Thread(target=self._score_in_parallel, args=arguments, daemon=True).start()
            return
        self._send(self._scores(engine, job))
        self._cancelled.discard(job.id)

    def _score_in_parallel(self, engine: Engine, job: ScoreChoices) -> None:
        answer = self._scores(engine, job)
        with _ending_without_server():
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

    def _scores(self, engine: Engine, job: ScoreChoices) -> Scores | Failed:
        request = job.request
        try:
            probabilities = engine.score_choices(request.messages, job.choices, request.tokens)
            if not all(map(math.isfinite, probabilities.values())):
                # JSON has no such numbers.
                raise ModelUnavailable("its probabilities are not finite numbers")
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare ones
            return _failed(job.id, error)
        return Scores(id=job.id, probabilities=probabilities)

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


def _failed(number: int, error: Exception) -> Failed:
    """Logs that a job has failed, and reports it with the reason if that is known."""
    if isinstance(error, SidecarError):
        invalid = isinstance(error, InvalidRequest)
        if not invalid:
            log.error("a request failed: %s", error.detail)
        return Failed(id=number, detail=error.detail, invalid=invalid)
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
