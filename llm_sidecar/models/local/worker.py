"""The process that holds one engine: `python -m llm_sidecar.models.local.worker`.

It reads messages of `protocol` from standard input and writes the answers to the former standard
output. It ends when its input ends, so that no worker outlives its server.

A job passes through three threads: one reads it, one tokenizes its text, and the main thread
generates. Long texts have a tokenizing thread of their own. So generation never waits for the
tokenizer, and a short text never waits for a long one.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from dataclasses import replace
from typing import IO, Final

import msgspec

from llm_sidecar.engines import Engine
from llm_sidecar.engines.base import Batch, Delta
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.errors import SidecarError, one_line
from llm_sidecar.logs import log_to_stderr
from llm_sidecar.models.local.cpu_limit import CpuLimit
from llm_sidecar.models.local.identity import load_identified
from llm_sidecar.models.local.out_of_memory import ended_first
from llm_sidecar.models.local.outbox import Outbox, ending_without_server
from llm_sidecar.models.local.prefill_jobs import PrefillJobs
from llm_sidecar.models.local.protocol import (
    FROM_SERVER,
    LOAD,
    Begun,
    Cancel,
    Check,
    Done,
    Generate,
    Job,
    LoadFailed,
    Prefill,
    PromptLogprobs,
    PromptText,
    Ready,
    RequestJob,
    ScoreQuestions,
)
from llm_sidecar.models.local.score_jobs import ScoreJobs
from llm_sidecar.models.local.unsent_text import UnsentText
from llm_sidecar.text import cleaned

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.02
"""Text is sent at most this often after the first token: one message per token would keep the
server's event loop busy."""
_LONG_LINE: Final = 8192
"""Messages of more bytes count as long; a typical request has a thousand."""
_TOKENIZING_SECONDS: Final = 10.0
"""Limit of CPU time for one chat; the slowest text of the default length takes a fiftieth of it."""


class GenerationJobs:
    """Generates completions at the same time, up to the capacity of a batch."""

    def __init__(self, batch: Batch, outbox: Outbox) -> None:
        """Has no job yet.

        Args:
            batch: without requests.
            outbox: receives the answers.
        """
        self._batch = batch
        self._outbox = outbox
        self._completions: dict[int, UnsentText] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def begin(self, job: Generate) -> None:
        """Adds a job; before that, takes steps until the batch has capacity for it."""
        while len(self._batch) >= self._batch.capacity:
            self.step()
        try:
            self._batch.add(job.id, job.request)
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare exceptions
            self._outbox.fail(job.id, error)
        else:
            self._completions[job.id] = UnsentText()

    def step(self) -> None:
        """Generates one step of each completion, and sends text that is due."""
        try:
            deltas = self._batch.step()
        except Exception as error:  # noqa: BLE001 - the runtimes raise bare exceptions
            for number in tuple(self._completions):
                del self._completions[number]
                self._outbox.fail(number, error)
            return
        now = time.monotonic()
        finished = {number for number, delta in deltas if self._add(number, delta, now)}
        for number in self._completions.keys() & self._outbox.cancelled - finished:
            self._batch.remove(number)
            self._outbox.write(Done(id=number))
            finished.add(number)
        for number in finished:
            del self._completions[number]
            self._outbox.cancelled.discard(number)
        # In one write, so that the server reads them all at once.
        self._outbox.flush()

    def _add(self, number: int, delta: Delta | Exception, now: float) -> bool:
        """Sends a completion's text if it is due, or its error; returns whether it has ended."""
        if isinstance(delta, Exception):
            self._outbox.fail(number, delta)
            return True
        completion = self._completions[number]
        completion.add(delta)
        ends = delta.finish_reason is not None or number in self._outbox.cancelled
        prompt = completion.prompt_logprobs
        if len(prompt) >= PREFILL_CHUNK or (prompt and (ends or completion.tokens)):
            self._outbox.write(PromptLogprobs(id=number, tokens=tuple(prompt)))
            prompt.clear()
        if ends or (completion.tokens and now - completion.sent_at >= _FLUSH_SECONDS):
            self._outbox.write(completion.progress(number, delta, now))
        return delta.finish_reason is not None


class Worker:
    """Serves one engine: jobs in order, up to its batch capacity at a time."""

    def __init__(self, inbox: IO[bytes], outbox: IO[bytes]) -> None:
        self._inbox = inbox
        self._outbox = Outbox(outbox)
        self._short: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._tokenized: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._scores = ScoreJobs(self._outbox)
        self._prefills = PrefillJobs(self._outbox)

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
            self._outbox.send(LoadFailed(one_line(error), permanent))
            return
        batch = engine.batch()
        self._outbox.send(
            Ready(identity, engine.context_length, batch.capacity, speed, engine.notes)
        )
        for received in (self._short, self._long):
            arguments = (engine, received)
            threading.Thread(target=self._tokenize_all, args=arguments, daemon=True).start()
        self._serve_all(engine, GenerationJobs(batch, self._outbox))

    def _read(self) -> None:
        for line in self._inbox:
            message = FROM_SERVER.decode(line)
            if isinstance(message, Cancel):
                if not self._scores.cancel(message.id):
                    self._outbox.cancelled.add(message.id)
            else:
                is_long = isinstance(message, Prefill) or len(line) > _LONG_LINE
                (self._long if is_long else self._short).put(message)
        os._exit(0)

    def _tokenize_all(self, engine: Engine, received: queue.SimpleQueue[Job]) -> None:
        """Tokenizes the jobs received, and passes them on in the same order."""
        limit = CpuLimit(_TOKENIZING_SECONDS)
        with ending_without_server():
            while True:
                job = received.get()
                if not self._outbox.end_cancelled(job.id):
                    self._tokenize(engine, job, limit)

    def _tokenize(self, engine: Engine, job: Job, limit: CpuLimit) -> None:
        if isinstance(job, Generate | ScoreQuestions):
            # Sent first, so that the server does not pass the job to the next worker if this one
            # crashes on it.
            self._outbox.send(Begun(id=job.id))
        try:
            job = _tokenized(engine, job, limit)
            echo = _echo(engine, job)
        except Exception as error:  # noqa: BLE001 - the packages raise bare exceptions
            self._outbox.fail(job.id, error)
            return
        if echo is not None:
            self._outbox.send(echo)
        if isinstance(job, Check):
            self._outbox.send(Done(id=job.id))
        else:
            self._tokenized.put(job)

    def _serve_all(self, engine: Engine, generations: GenerationJobs) -> None:
        """Takes jobs in order. Steps of scores run between the steps of the batch, prefills while
        there is no other work."""
        while True:
            busy = generations or self._scores or self._prefills
            try:
                job = self._tokenized.get(block=not busy)
            except queue.Empty:
                if generations:
                    generations.step()
                self._scores.step()
                if not (generations or self._scores):
                    self._prefills.step()
                continue
            match job:
                case Generate():
                    generations.begin(job)
                case ScoreQuestions():
                    self._scores.begin(engine, job)
                case Prefill():
                    self._prefills.begin(engine, job)


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


def _echo(engine: Engine, job: Job) -> PromptText | None:
    """The prompt of a tokenized job as text, if it is requested."""
    if not isinstance(job, Generate) or not job.request.echo:
        return None
    return PromptText(id=job.id, text=cleaned(engine.text_of(job.request.tokens or ())))


def main() -> None:
    """Runs a worker on the standard streams; output of `print` goes to standard error instead."""
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with ending_without_server():
        Worker(sys.stdin.buffer, outbox).run()


if __name__ == "__main__":
    main()
