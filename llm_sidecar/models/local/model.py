"""A language model on this machine: `ChatModel` over a worker process that holds it.

Requests are served in FIFO order, up to the worker's batch capacity at a time, each within its
deadline. Closing a stream stops the generation in the worker, which a `Supervisor` keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import ANSWER_TOKENS
from llm_sidecar.errors import ModelUnavailable, SidecarError
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    ModelStatus,
)
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.job_runner import JobRunner
from llm_sidecar.models.local.limits import HostLimits
from llm_sidecar.models.local.loader import WorkerLoader
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.protocol import Generate, Prefill, Progress, ScoreChoices, Scores
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.local.supervisor import Supervisor
from llm_sidecar.telemetry.calls import (
    CallObserver,
    ModelCall,
    Observers,
    Operation,
    WorkerDeath,
    observed,
)

__all__ = ["HostLimits", "LocalModel"]

log = logging.getLogger(__name__)


class LocalModel(ChatModel):
    """One model in a worker process; see the module's docstring."""

    def __init__(
        self,
        name: str,
        locate: Callable[[], ModelFiles],
        *,
        device: str = "auto",
        threads: int = 1,
        limits: HostLimits | None = None,
        preload: bool = False,
        observer: CallObserver | None = None,
        on_death: Callable[[WorkerDeath], None] = lambda death: None,
    ) -> None:
        """Starts nothing.

        Args:
            name: `phi3` or `hermes`.
            locate: finds the files at every load; raises ModelUnavailable.
            device: `auto`, `cpu` or `cuda`.
            threads: of the runtime, on CPU.
            limits: bounds of queue and time.
            preload: whether `start` loads the model, which is not ready until then; otherwise the
                first request loads it.
            observer: receives the start and the end of each call.
            on_death: is called with each unexpected end of a worker.
        """
        self._limits = limits or HostLimits()
        self._preload = preload
        self._observer = observer or Observers()
        self._on_death = on_death
        self._loader = WorkerLoader(name, locate, device, threads, self._limits.load_timeout)
        self._supervisor = Supervisor(
            self._loader, self._limits, preload=preload, on_death=self._report_death
        )
        self._queue = RequestQueue(name, self._limits.queue_length)
        self._jobs = JobRunner(self._supervisor, self._queue, self._limits.load_wait)

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; see `ChatModel.stream`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        with self._call("generate") as call:
            answers = self._jobs.run(call, Generate(request=request), deadline)
            try:
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        if isinstance(answer, Progress):
                            yield _delta(call, answer.text)
            except TimeoutError:
                if not (allow_partial and call.completion_tokens):
                    raise self._missed(call, deadline) from None
                call.finish_reason = "deadline"
                yield _delta(call, "")

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        """Scores; see `ChatModel.score_choices`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        job = ScoreChoices(request=GenerationRequest(messages, ANSWER_TOKENS), choices=choices)
        with self._call("score_choices") as call:
            try:
                async with contextlib.aclosing(self._jobs.run(call, job, deadline)) as answers:
                    async for answer in answers:
                        if isinstance(answer, Scores):
                            probabilities = answer.probabilities
            except TimeoutError:
                raise self._missed(call, deadline) from None
        return ChoiceScores(probabilities)

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prefills this prefix, now and at each load; requests have priority."""
        self._loader.prefix = prefix
        if (worker := self._supervisor.slot.live_worker) is not None:
            _, inbox = worker.send(Prefill(request=prefix))
            await inbox.get()

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Switches the adapter; see `ChatModel.use_adapter`.

        A second worker loads the model with the adapter, so no request waits. Cancelling this call
        cancels the switch.
        """
        await self._supervisor.use_adapter(adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to serve with this adapter; loads the model now if it is preloaded."""
        self._supervisor.adapter = adapter
        if self._preload:
            try:
                self._supervisor.start()
            except ModelUnavailable as error:
                log.error("%s", error.detail)

    def status(self) -> ModelStatus:
        """The state now."""
        return replace(
            self._supervisor.status(),
            requests=self._queue.admitted,
            running=self._queue.running,
            queue_length=self._queue.length,
        )

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        self._supervisor.drain()

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives running ones `grace` seconds to finish, then ends all
        workers."""
        self._supervisor.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._queue.idle.wait()
        await self._supervisor.close()
        self._jobs.close()

    @contextlib.contextmanager
    def _call(self, operation: Operation) -> Iterator[ModelCall]:
        """Admits a request and observes it."""
        with observed(self._observer, ModelCall(self._loader.name, operation)) as call:
            self._supervisor.check_open()
            with self._queue.admit():
                self._supervisor.start()
                yield call

    def _missed(self, call: ModelCall, deadline: Deadline) -> SidecarError:
        """The error of a call whose deadline has passed."""
        if call.begun is None and not self._supervisor.load_state.is_ready:
            return self._supervisor.load_state.error()
        return deadline.exceeded(call, self._queue.retry_after())

    def _report_death(self, worker: WorkerProcess) -> None:
        call = next(iter(worker.calls.values()), None)
        how = worker.how_it_ended()
        self._on_death(WorkerDeath(self._loader.name, worker.adapter, how, call))


def _delta(call: ModelCall, text: str) -> Delta:
    """New text of a call, with the counts so far."""
    assert call.served_by is not None
    return Delta(
        text,
        call.served_by,
        call.adapter,
        call.prompt_tokens,
        call.completion_tokens,
        call.cached_tokens,
        call.finish_reason,
    )
