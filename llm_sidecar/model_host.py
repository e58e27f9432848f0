"""An asynchronous handle on one worker process that holds one model.

The host starts the worker when it is first needed, starts it again with backoff when it dies,
queues requests first come, first served, gives the worker as many as it generates together, and
each a deadline. Cancelling the awaiting task stops the generation in the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from llm_sidecar.engines import FinishReason, GenerationRequest, Message
from llm_sidecar.errors import (
    AdapterRejected,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
)
from llm_sidecar.loader import ModelFiles
from llm_sidecar.telemetry.calls import (
    CallObserver,
    ModelCall,
    Observers,
    Operation,
    WorkerDeath,
    observed,
)
from llm_sidecar.worker_process import WorkerEnded, WorkerProcess

log = logging.getLogger(__name__)

State = Literal["unloaded", "loading", "ready", "failed"]

_CANCEL_GRACE: Final = 30.0
"""Seconds a worker has to give up a cancelled request before it is taken for hung and killed."""
_LOOK_SECONDS: Final = 0.2
"""Seconds for which it is known whether a model's files are there."""
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 30.0
_SETTLED: Final = 60.0
"""Seconds after which a worker counts as healthy, and the next failure starts the backoff anew."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        model: the label of the model that wrote it.
        adapter: the name of the adapter that it had.
        cached_tokens: of the prompt, that were read for an earlier one.
    """

    text: str
    model: str
    adapter: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of a host; times in seconds.

    Attributes:
        queue_length: requests that may run and wait at once.
        request_timeout: from admission to the answer.
        load_wait: how long a request waits for a model that is loading.
        load_timeout: how long a model may load.
    """

    queue_length: int = 64
    request_timeout: float = 60.0
    load_wait: float = 8.0
    load_timeout: float = 300.0


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
        self._locate = locate
        self._spec = {"device": device, "threads": threads, "warm_up": asdict(warm_up)}
        self._prefix = prefix
        self._adapter: Path | None = None
        self._swapping = asyncio.Lock()
        self._successor: WorkerProcess | None = None
        self._limits = limits or HostLimits()
        self._together = 1
        self._slots = asyncio.Semaphore(1)
        self._observer = observer or Observers()
        self._on_death = on_death
        self._serving: dict[int, ModelCall] = {}
        self._admitted = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._state: State = "unloaded"
        self._reason: str | None = None
        self._worker: asyncio.Future[WorkerProcess] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._watchdogs: set[asyncio.Task[None]] = set()
        self._restarts = 0
        self._next_load = 0.0
        self._died = -math.inf
        self._tokens_before = 0
        self._recent_seconds = 1.0
        self._closed = False
        self._look_again = 0.0
        self._missing_reason: str | None = None

    async def generate(self, request: GenerationRequest) -> Completion:
        """The whole completion.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        text: list[str] = []
        async with contextlib.aclosing(self._call("generate", request=asdict(request))) as steps:
            async for step in steps:
                text.append(step[1]["text"])
        call, message = step
        assert call.served_by is not None
        return Completion(
            "".join(text),
            call.served_by,
            call.adapter,
            message["finish_reason"],
            message["prompt_tokens"],
            message["completion_tokens"],
            message["cached_tokens"],
        )

    async def answer_probabilities(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> dict[str, float]:
        """Probability that the assistant's whole turn is each of `answers`.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        call = self._call("choose", messages=list(messages), answers=list(answers))
        async with contextlib.aclosing(call) as steps:
            async for _, message in steps:
                result: dict[str, float] = message["probabilities"]
        return result

    def preload(self) -> None:
        """Starts to load the model now instead of at the first request.

        Raises:
            ModelUnavailable: its files are missing.
        """
        self._start()

    async def prepare(self) -> None:
        """Has a prefix that has changed read beside the old one, while nobody asks for anything.

        Returns once that is done, and at once where no model is loaded, which will begin with it.
        """
        worker = self._live_worker()
        if worker is None or self._prefix is None:
            return
        _, inbox = worker.send("prepare", {"request": asdict(self._prefix())})
        await inbox.get()

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter in use."""
        return self._adapter

    def begin_with(self, adapter: Path) -> None:
        """The adapter that the model is first loaded with; call it before anything is asked."""
        self._adapter = adapter

    async def swap_adapter(self, adapter: Path | None) -> None:
        """Has requests answered with another adapter, or with none, from the next one on.

        Running and waiting requests are not lost; where it cannot be loaded all stays as it was.

        Raises:
            AdapterRejected: it cannot be loaded; says why.
            ModelUnavailable: the model itself is missing or does not load.
        """
        async with self._swapping:
            self._start()
            by = time.monotonic() + self._limits.load_timeout
            worker = await self._ready(by)
            try:
                if adapter is None or self._adapter is None:
                    await self._hand_over(adapter, by)
                else:
                    await self._swap_within(worker, adapter)
            except AdapterRejected as error:
                name = None if adapter is None else adapter.name
                raise AdapterRejected(f"The adapter {name} is refused: {error.detail}") from None

    async def _swap_within(self, worker: WorkerProcess, adapter: Path) -> None:
        """Has a worker, which has an adapter, take another between two requests."""
        _, inbox = worker.send("adapter", {"folder": str(adapter)})
        message = await inbox.get()
        if message["op"] == "error":
            raise AdapterRejected(message.get("detail") or f"its worker ended: {message['died']}")
        self._adapter = adapter

    async def _hand_over(self, adapter: Path | None, by: float) -> None:
        """Loads the model with the adapter in a worker beside the one that runs, and switches.

        A model that is loaded without one has no room for adapters, and is faster for it.
        """
        try:
            successor = await self._loaded_worker(adapter)
        except ModelUnavailable as error:
            raise AdapterRejected(error.detail) from None
        except OSError as error:
            raise AdapterRejected(f"no worker can be started: {error.strerror}") from None
        handed_over = False
        try:
            # With all slots held no request runs, and the next one meets the successor.
            async with contextlib.AsyncExitStack() as held:
                slots = self._slots
                for _ in range(self._together):
                    await held.enter_async_context(slots)
                replaced = await self._ready(by)
                self._successor, self._adapter = successor, adapter
                handed_over = True
                self._worker = asyncio.get_running_loop().create_future()
                self._state = "loading"
                await replaced.stop()
                await self._ready(by)
        finally:
            if not handed_over:
                await successor.stop()

    def available(self) -> bool:
        """Whether a request would be served, now or after loading."""
        if self._state == "unloaded":
            return self._missing() is None
        return self._state == "ready"

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        missing = self._missing() if self._state == "unloaded" else None
        worker = self._live_worker()
        return {
            "state": self._state if missing is None else "failed",
            "reason": missing or self._reason,
            "model": worker.label if worker else None,
            "adapter": self._adapter_name(),
            "runtime": worker.info["runtime"] if worker else None,
            "device": worker.info["device"] if worker else None,
            "pid": worker.process.pid if worker else None,
            "requests": self._admitted,
            "queue_length": self._limits.queue_length,
            "running": self._running,
            "restarts": self._restarts,
            "completion_tokens_total": self._tokens_before + (worker.tokens if worker else 0),
        }

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives the running ones `grace` seconds, then ends the worker."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        if self._successor is not None:
            await self._successor.stop()
        if self._worker is not None and not self._worker.done():
            self._worker.set_exception(
                ModelUnavailable("The server is shutting down; try again.", retry_after=5)
            )
            self._worker.exception()
        for task in (*self._watchdogs,):
            task.cancel()
        self._state = "unloaded"

    async def _call(
        self, op: Operation, **body: Any
    ) -> AsyncGenerator[tuple[ModelCall, dict[str, Any]], None]:
        """Admits a request, waits for its turn and the model, and yields (call, message)s."""
        with observed(self._observer, ModelCall(self.name, op)) as call, self._admission():
            ready_by = time.monotonic() + self._limits.load_wait
            try:
                async with asyncio.timeout(self._limits.request_timeout), self._slots:
                    started = time.monotonic()
                    async for step in self._converse(call, ready_by, body):
                        yield step
                    elapsed = time.monotonic() - started
                    self._recent_seconds += 0.2 * (elapsed - self._recent_seconds)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{self.name} did not answer within {self._limits.request_timeout:g} s; "
                    "try again later or with a smaller max_length."
                ) from None

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """Counts a request as long as it is here; refuses it where too many are."""
        self._check_open()
        if self._admitted >= self._limits.queue_length:
            wait = max(1, round(self._admitted / self._together * self._recent_seconds))
            raise QueueFull(
                f"The {self.name} queue is full; try again in {wait} s.", retry_after=wait
            )
        self._start()
        self._admitted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._idle.set()

    async def _converse(
        self, call: ModelCall, ready_by: float, body: dict[str, Any]
    ) -> AsyncGenerator[tuple[ModelCall, dict[str, Any]], None]:
        """Sends a request to the worker and yields (call, message)s.

        A request whose worker had died unnoticed before it began goes to the next worker.
        """
        begun = finished = False
        while not finished:
            worker = await self._ready(ready_by)
            call.served_by = worker.label
            number, inbox = worker.send(call.operation, body)
            self._serving[id(call)] = call
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
                if "died" not in message:
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

        task = asyncio.create_task(let_go())
        self._watchdogs.add(task)
        task.add_done_callback(self._watchdogs.discard)

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailable("The server is shutting down; try again.", retry_after=5)

    def _start(self) -> None:
        self._check_open()
        if self._supervisor is not None and not self._supervisor.done():
            return
        self._locate()
        self._worker = asyncio.get_running_loop().create_future()
        self._state, self._reason = "loading", None
        # It outlives the request that was the first, so it does not log in its name.
        self._supervisor = asyncio.create_task(self._supervise(), context=contextvars.Context())

    async def _ready(self, by: float) -> WorkerProcess:
        """The worker, as soon as it is ready; ModelUnavailable when it is not by then.

        One that has died meanwhile gets as long to be replaced as one that is loaded first.
        """
        while True:
            if self._supervisor is None or self._supervisor.done():
                self._check_open()
            future = self._worker
            if future is None:
                raise ModelUnavailable(f"{self.name} is not loaded.", retry_after=1)
            until = max(by, self._died + self._limits.load_wait)
            if not future.done() and self._next_load > until:
                raise ModelUnavailable(
                    f"The {self.name} model is not available: {self._reason}.",
                    retry_after=max(1, round(self._next_load - time.monotonic())),
                )
            if not future.done():
                await asyncio.wait([future], timeout=max(0.0, until - time.monotonic()))
            if not future.done():
                raise ModelUnavailable(f"The {self.name} model is still loading.", retry_after=5)
            worker = future.result()
            if worker.alive:
                return worker
            # Its end is known here before the supervisor has run.
            await asyncio.sleep(0)

    async def _supervise(self) -> None:
        """Keeps a worker running until it is cancelled."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                async with self._running_worker() as worker:
                    await worker.ended.wait()
                    self._died = time.monotonic()
                    self._tokens_before += worker.tokens
                    reason = f"The {self.name} worker ended ({worker.how_it_ended()})"
                if self._successor is not None:
                    continue
                self._tell_death(worker.how_it_ended())
            except ModelUnavailable as error:
                reason = error.detail
                if isinstance(error, WorkerEnded):
                    self._tell_death(error.how)
            except OSError as error:
                reason = f"The {self.name} worker could not be started: {error.strerror}"
            failures = 0 if time.monotonic() - began > _SETTLED else failures + 1
            delay = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2 ** (failures - 1)) if failures else 0.0
            delay *= random.uniform(0.8, 1.2)
            log.error("%s; starting it again in %.1f s", reason, delay)
            self._fail(reason, delay)
            self._restarts += 1
            await asyncio.sleep(delay)
            self._state = "loading"

    def _tell_death(self, how: str) -> None:
        # The requests it served may have heard of it already, or be about to.
        call = next(iter(self._serving.values()), None)
        self._serving.clear()
        self._on_death(WorkerDeath(self.name, self._adapter_name(), how, call))

    def _fail(self, reason: str, delay: float) -> None:
        """Tells those who wait for a load why it failed; the next ones wait for the next load."""
        loading, self._worker = self._worker, asyncio.get_running_loop().create_future()
        self._state, self._reason = "failed", reason
        self._next_load = time.monotonic() + delay
        if loading is not None and not loading.done():
            loading.set_exception(
                ModelUnavailable(
                    f"The {self.name} model could not be loaded: {reason}",
                    retry_after=max(1, round(delay)),
                )
            )
            loading.exception()

    @contextlib.asynccontextmanager
    async def _running_worker(self) -> AsyncGenerator[WorkerProcess, None]:
        successor, self._successor = self._successor, None
        worker = successor or await self._loaded_worker(self._adapter)
        try:
            self._state, self._reason = "ready", None
            if worker.info["together"] != self._together:
                # Those that hold a slot of the old ones, or wait for one, use these to their end.
                self._together = worker.info["together"]
                self._slots = asyncio.Semaphore(self._together)
            assert self._worker is not None
            self._worker.set_result(worker)
            yield worker
        finally:
            await worker.stop()

    async def _loaded_worker(self, adapter: Path | None) -> WorkerProcess:
        files = self._locate()
        began = time.monotonic()
        worker = await WorkerProcess.start(files.label)
        try:
            async with asyncio.timeout(self._limits.load_timeout):
                await worker.load(
                    {
                        **self._spec,
                        "folder": str(files.folder),
                        "prefix": None if self._prefix is None else asdict(self._prefix()),
                        "adapter": None if adapter is None else str(adapter),
                    }
                )
        except BaseException as error:
            await worker.stop()
            if isinstance(error, TimeoutError):
                raise ModelUnavailable(
                    f"it did not load within {self._limits.load_timeout:g} s"
                ) from None
            raise
        log.info(
            "%s is ready after %.1f s: %s on %s, %s",
            self.name,
            time.monotonic() - began,
            files.label,
            worker.info["runtime"],
            worker.info["device"],
        )
        return worker

    def _missing(self) -> str | None:
        """Why the files cannot be loaded; every probe asks, so it is not always looked at anew."""
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again = now + _LOOK_SECONDS
            try:
                self._locate()
            except ModelUnavailable as error:
                self._missing_reason = error.detail
            else:
                self._missing_reason = None
        return self._missing_reason

    def _adapter_name(self) -> str | None:
        return None if self._adapter is None else self._adapter.name

    def _live_worker(self) -> WorkerProcess | None:
        if self._worker is None or not self._worker.done() or self._worker.exception():
            return None
        worker = self._worker.result()
        return worker if worker.alive else None


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
