"""Requests for one model: an asynchronous handle on the worker process that holds it.

The host queues requests first come, first served, gives the worker as many as it generates
together, and each a deadline. Cancelling the awaiting task stops the generation in the worker,
which a `supervisor` keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import FinishReason, GenerationRequest, Message
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, QueueFull
from llm_sidecar.logs import start_owned
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.supervisor import Supervisor
from llm_sidecar.telemetry.calls import (
    CallObserver,
    ModelCall,
    Observers,
    Operation,
    WorkerDeath,
    observed,
)

log = logging.getLogger(__name__)

_CANCEL_GRACE: Final = 30.0
"""Seconds a worker has to give up a cancelled request before it is taken for hung and killed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        model: the label of the model that wrote it.
        adapter: the name of the adapter that it had.
        finish_reason: `deadline` if the request's deadline cut the text.
        cached_tokens: of the prompt, that were read for an earlier one.
    """

    text: str
    model: str
    adapter: str | None
    finish_reason: FinishReason | Literal["deadline"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of a host; times in seconds.

    Attributes:
        queue_length: requests that may run and wait at once. request_timeout: from admission to the
        answer, for a call without a deadline of its own. load_wait: maximum seconds that a request
        waits for a loading model; None: until its deadline. load_timeout: how long a model may
        load.
    """

    queue_length: int = 64
    request_timeout: float = 60.0
    load_wait: float | None = None
    load_timeout: float = 300.0

    @property
    def patience(self) -> float:
        """Maximum seconds that a request waits for a loading model, if its deadline is not
        earlier."""
        if self.load_wait is None:
            return self.request_timeout
        return min(self.load_wait, self.request_timeout)


class ModelHost:
    """One model in a worker process; see the module's docstring."""

    def __init__(
        self,
        name: str,
        locate: Callable[[], ModelFiles],
        *,
        device: str = "auto",
        threads: int = 1,
        limits: HostLimits | None = None,
        warm_up: GenerationRequest,
        prefix: Callable[[], GenerationRequest] | None = None,
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
            warm_up: what the worker generates once before it counts as ready.
            prefix: gives the turns that requests begin with at present, and all else as they have
                it; a worker has read them before it counts as ready.
            observer: hears of every call.
            on_death: hears of every end of a worker that nobody asked for.
        """
        self.name = name
        self._limits = limits or HostLimits()
        self._supervisor = Supervisor(
            name,
            locate,
            {"device": device, "threads": threads, "warm_up": asdict(warm_up)},
            prefix=prefix,
            load_wait=self._limits.load_wait,
            patience=self._limits.patience,
            load_timeout=self._limits.load_timeout,
            drain_timeout=self._limits.request_timeout,
            on_death=self._tell_death,
        )
        self._turns = asyncio.Semaphore(1)
        self._capacity = 1
        self._observer = observer or Observers()
        self._on_death = on_death
        self._serving: dict[int, tuple[WorkerProcess, ModelCall]] = {}
        self._admitted = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._watchdogs: set[asyncio.Task[None]] = set()
        self._recent_seconds = 1.0

    async def generate(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> Completion:
        """The completion.

        Args:
            request: what to generate.
            deadline: of the request that this call belongs to.
            allow_partial: at the deadline returns the text so far, if any, with the finish reason
                `deadline`.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        text: list[str] = []
        call = self._call("generate", deadline, allow_partial, request=asdict(request))
        async with contextlib.aclosing(call) as steps:
            async for step in steps:
                text.append(step[1]["text"])
        served, message = step
        assert served.served_by is not None
        return Completion(
            "".join(text),
            served.served_by,
            served.adapter,
            message["finish_reason"] or "deadline",
            message["prompt_tokens"],
            message["completion_tokens"],
            message["cached_tokens"],
        )

    async def answer_probabilities(
        self,
        messages: Sequence[Message],
        answers: Sequence[str],
        deadline: Deadline | None = None,
    ) -> dict[str, float]:
        """Probability that the assistant's whole turn is each of `answers`.

        Args:
            messages: the chat so far.
            answers: the turns to choose from.
            deadline: of the request that this call belongs to.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        call = self._call("choose", deadline, messages=list(messages), answers=list(answers))
        async with contextlib.aclosing(call) as steps:
            async for _, message in steps:
                result: dict[str, float] = message["probabilities"]
        return result

    def preload(self) -> None:
        """Starts to load the model now instead of at the first request; it is not ready until then.

        Raises:
            ModelUnavailable: its files are missing.
        """
        self._supervisor.preload()

    async def prepare(self) -> None:
        """Has a prefix that has changed read beside the old one, while nobody asks for anything.

        Returns once that is done, and at once where no model is loaded, which will begin with it.
        """
        await self._supervisor.prepare()

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter in use."""
        return self._supervisor.adapter

    def begin_with(self, adapter: Path) -> None:
        """The adapter that the model is first loaded with; call it before anything is asked."""
        self._supervisor.adapter = adapter

    async def swap_adapter(self, adapter: Path | None) -> None:
        """Answers the next requests with another adapter, or with none.

        A second worker loads the model with it, so no request waits; running requests end with the
        adapter that they began with. If the adapter cannot be loaded in time, the one in use stays.
        Cancelling this call cancels the swap.

        Raises:
            AdapterRejected: it cannot be loaded; says why.
            ModelUnavailable: the model itself is missing, or the host is closing.
        """
        await self._supervisor.swap_adapter(adapter)

    def available(self) -> bool:
        """Whether a request that arrives now would most likely be served in time."""
        return self.not_ready() is None

    def not_ready(self) -> str | None:
        """Why it would not; None if it would. See `Supervisor.not_ready`."""
        return self._supervisor.not_ready()

    def refuse_waiting(self) -> None:
        """Refuses requests that wait for the model to load, from now on; call it when the server
        drains."""
        self._supervisor.refuse_waiting()

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        return {
            **self._supervisor.status(),
            "requests": self._admitted,
            "queue_length": self._limits.queue_length,
            "running": self._running,
        }

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives the running ones `grace` seconds, then ends all workers."""
        self._supervisor.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        await self._supervisor.close()
        for task in (*self._watchdogs,):
            task.cancel()

    async def _call(
        self,
        op: Operation,
        deadline: Deadline | None,
        allow_partial: bool = False,
        **body: Any,
    ) -> AsyncGenerator[tuple[ModelCall, dict[str, Any]], None]:
        """Admits a request, waits for its turn and the model, and yields (call, message)s.

        With `allow_partial` the messages may end at the deadline without a `done`.
        """
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        with observed(self._observer, ModelCall(self.name, op)) as call, self._admission():
            ready_by = time.monotonic() + deadline.remaining()
            if self._limits.load_wait is not None:
                ready_by = min(ready_by, time.monotonic() + self._limits.load_wait)
            self._supervisor.check_waiting(ready_by)
            try:
                async with asyncio.timeout(deadline.remaining()):
                    if self._running >= self._supervisor.together:
                        await self._check(ready_by, body)
                    async with self._turns:
                        started = time.monotonic()
                        async for step in self._converse(call, ready_by, body):
                            yield step
                        elapsed = time.monotonic() - started
                        self._recent_seconds += 0.2 * (elapsed - self._recent_seconds)
            except TimeoutError:
                if call.begun is None and not self._supervisor.loaded:
                    raise self._supervisor.not_loaded() from None
                if not (allow_partial and call.completion_tokens):
                    raise deadline.exceeded(call, self._retry_after()) from None
                call.finish_reason = "deadline"

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """Counts a request as long as it is here; refuses it where too many are."""
        self._supervisor.check_open()
        if self._admitted >= self._limits.queue_length:
            wait = self._retry_after()
            raise QueueFull(
                f"The {self.name} queue is full; try again in {wait} s.", retry_after=wait
            )
        self._supervisor.start()
        self._admitted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._idle.set()

    def _retry_after(self) -> int:
        """Estimated seconds until the requests that run and wait now are answered."""
        return max(1, round(self._admitted / self._supervisor.together * self._recent_seconds))

    async def _check(self, ready_by: float, body: dict[str, Any]) -> None:
        """Refuses a prompt that does not fit the context before it waits for its turn."""
        worker = await self._supervisor.ready(ready_by)
        _, inbox = worker.send("check", body)
        message = await inbox.get()
        if message.get("invalid"):
            raise _as_exception(message, self.name)

    async def _converse(
        self, call: ModelCall, ready_by: float, body: dict[str, Any]
    ) -> AsyncGenerator[tuple[ModelCall, dict[str, Any]], None]:
        """Sends a request to the worker and yields (call, message)s.

        A request whose worker had died unnoticed before it began goes to the next worker.
        """
        begun = finished = False
        while not finished:
            worker = await self._supervisor.ready(ready_by)
            while self._capacity < self._supervisor.together:
                self._capacity += 1
                self._turns.release()
            call.served_by, call.adapter = worker.label, worker.adapter
            number, inbox = worker.send(call.operation, body)
            self._serving[id(call)] = worker, call
            message: dict[str, Any] = {}
            self._running += 1
            try:
                while not finished:
                    message = await inbox.get()
                    call.note(message)
                    finished = message["op"] in ("done", "error")
                    begun |= message["op"] == "begun"
                    if message["op"] in ("delta", "done"):
                        yield call, message
            finally:
                self._running -= 1
                if "died" not in message or worker.stopping:
                    self._serving.pop(id(call), None)
                if not finished:
                    self._watch(worker, number, inbox)
            if message["op"] == "error":
                if begun or "died" not in message:
                    raise _as_exception(message, self.name)
                finished = False

    def _watch(
        self, worker: WorkerProcess, number: int, inbox: asyncio.Queue[dict[str, Any]]
    ) -> None:
        """Cancels a request that nobody waits for, and kills a worker that does not let go."""
        worker.cancel(number)

        async def let_go() -> None:
            try:
                async with asyncio.timeout(_CANCEL_GRACE):
                    while (await inbox.get())["op"] not in ("done", "error"):
                        pass
            except TimeoutError:
                log.error("%s does not give up a cancelled request; killing it", self.name)
                worker.process.kill()

        task = start_owned(let_go())
        self._watchdogs.add(task)
        task.add_done_callback(self._watchdogs.discard)

    def _tell_death(self, worker: WorkerProcess) -> None:
        # The requests it served may have heard of it already, or be about to.
        served = [key for key, (its_worker, _) in self._serving.items() if its_worker is worker]
        calls = [self._serving.pop(key)[1] for key in served]
        call = calls[0] if calls else None
        self._on_death(WorkerDeath(self.name, worker.adapter, worker.how_it_ended(), call))


def _as_exception(message: dict[str, Any], name: str) -> Exception:
    if "died" in message:
        return ModelUnavailable(
            f"The {name} worker ended while it answered ({message['died']}); try again.",
            retry_after=1,
        )
    if message.get("invalid"):
        return InvalidRequest(message["detail"])
    return ModelUnavailable(
        f"The {name} model failed on this request ({message['detail']}); see the log.",
        retry_after=1,
    )
