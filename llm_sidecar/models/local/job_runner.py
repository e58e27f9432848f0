"""Runs jobs on the worker that serves; each waits for its turn and for the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import GenerationRequest
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, SidecarError
from llm_sidecar.logs import start_owned
from llm_sidecar.models.local.process import Inbox, WorkerProcess
from llm_sidecar.models.local.protocol import (
    Answer,
    Begun,
    Check,
    Died,
    Failed,
    Job,
    Progress,
    is_final,
)
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.local.supervisor import Supervisor
from llm_sidecar.telemetry.calls import ModelCall

log = logging.getLogger(__name__)

_CANCEL_GRACE: Final = 30.0
"""Seconds a worker has to end a cancelled job; then it counts as hung and is killed."""


class JobRunner:
    """Runs the jobs of one model, up to the worker's capacity at a time."""

    def __init__(
        self, supervisor: Supervisor, queue: RequestQueue, load_wait: float | None
    ) -> None:
        """Starts nothing.

        Args:
            supervisor: provides the worker.
            queue: determines which job runs next.
            load_wait: seconds that a job waits for a loading model; None: until its deadline.
        """
        self._supervisor = supervisor
        self._queue = queue
        self._load_wait = load_wait
        self._watchdogs: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Stops watching cancelled jobs."""
        for task in (*self._watchdogs,):
            task.cancel()

    async def run(
        self, call: ModelCall, job: Job, deadline: Deadline
    ) -> AsyncGenerator[Answer, None]:
        """Yields the answers to a job and records them in the call; closing it cancels the job.

        A job whose worker dies before it begins goes to the next worker.

        Raises:
            InvalidRequest, ModelUnavailable
            TimeoutError: the deadline passes first.
        """
        ready_by = time.monotonic() + deadline.remaining()
        if self._load_wait is not None:
            ready_by = min(ready_by, time.monotonic() + self._load_wait)
        self._supervisor.check_waiting(ready_by)
        if self._queue.busy:
            async with deadline.timeout():
                await self._check(job.request, ready_by)
        async with self._queue.turn(deadline):
            answered = False
            while not answered:
                async with deadline.timeout():
                    worker = await self._supervisor.ready(ready_by)
                async with contextlib.aclosing(self._serve(worker, call, job, deadline)) as answers:
                    async for answer in answers:
                        answered = is_final(answer)
                        yield answer

    async def _check(self, request: GenerationRequest, ready_by: float) -> None:
        """Refuses a prompt that does not fit the context before it waits for its turn."""
        worker = await self._supervisor.ready(ready_by)
        _, inbox = worker.send(Check(request=request))
        answer = await inbox.get()
        if isinstance(answer, Failed) and answer.invalid:
            raise InvalidRequest(answer.detail)

    async def _serve(
        self, worker: WorkerProcess, call: ModelCall, job: Job, deadline: Deadline
    ) -> AsyncGenerator[Answer, None]:
        """Sends a job to one worker and yields its answers: none if it dies before it begins."""
        assert worker.ready is not None
        self._queue.grow(worker.ready.capacity)
        call.served_by, call.adapter = worker.label, worker.adapter
        number, inbox = worker.send(job)
        worker.calls[number] = call
        answer: Answer | None = None
        self._queue.running += 1
        try:
            while answer is None or not is_final(answer):
                async with deadline.timeout():
                    answer = await inbox.get()
                _note(call, answer)
                if not isinstance(answer, Failed | Died):
                    yield answer
        finally:
            self._queue.running -= 1
            if not isinstance(answer, Died):
                del worker.calls[number]
            if answer is None or not is_final(answer):
                self._cancel(worker, number, inbox)
        if isinstance(answer, Failed) or (isinstance(answer, Died) and call.begun is not None):
            raise _error(answer, call.model)

    def _cancel(self, worker: WorkerProcess, number: int, inbox: Inbox) -> None:
        """Cancels a job, and kills the worker if it does not end the job soon."""
        worker.cancel(number)
        task = start_owned(self._kill_if_hung(worker, inbox))
        self._watchdogs.add(task)
        task.add_done_callback(self._watchdogs.discard)

    async def _kill_if_hung(self, worker: WorkerProcess, inbox: Inbox) -> None:
        try:
            async with asyncio.timeout(_CANCEL_GRACE):
                while not is_final(await inbox.get()):
                    pass
        except TimeoutError:
            log.error("%s does not end a cancelled request; killing it", worker.label)
            worker.process.kill()


def _note(call: ModelCall, answer: Answer) -> None:
    """Records the times and counts of an answer in the call."""
    if isinstance(answer, Begun):
        call.begun = answer.at
    elif isinstance(answer, Progress):
        call.progressed(
            answer.at,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            finish_reason=answer.finish_reason,
        )


def _error(answer: Failed | Died, name: str) -> SidecarError:
    if isinstance(answer, Died):
        return ModelUnavailable(
            f"The {name} worker ended while it answered ({answer.how}); try again.", retry_after=1
        )
    if answer.invalid:
        return InvalidRequest(answer.detail)
    return ModelUnavailable(
        f"The {name} model failed on this request ({answer.detail}); see the log.", retry_after=1
    )
