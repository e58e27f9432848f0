"""Keeps one worker process with its model running, and replaces it to change the adapter.

The worker is started when it is first needed, and again with backoff when it dies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.process import WorkerEnded, WorkerProcess

log = logging.getLogger(__name__)

State = Literal["unloaded", "loading", "ready", "failed"]

_LOOK_SECONDS: Final = 0.2
"""Seconds for which it is known whether a model's files are there."""
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 30.0
_SETTLED: Final = 60.0
"""Seconds after which a worker counts as healthy, and the next failure starts the backoff anew."""


class Supervisor:
    """One serving worker; see the module's docstring.

    A swap loads the new adapter in a second worker. Once that is ready, new requests go to it, and
    the first worker ends after its last request. So no request waits for a swap, and requests go on
    if an adapter loads slowly or crashes its worker.

    Attributes:
        adapter: folder of the adapter in use; set it before anything is started to begin with one.
        together: requests that the worker generates at the same time.
    """

    def __init__(
        self,
        name: str,
        locate: Callable[[], ModelFiles],
        spec: Mapping[str, Any],
        *,
        prefix: Callable[[], GenerationRequest] | None,
        load_wait: float | None,
        patience: float,
        load_timeout: float,
        drain_timeout: float,
        on_death: Callable[[WorkerProcess], None],
    ) -> None:
        """Starts nothing.

        Args:
            name: `phi3` or `hermes`.
            locate: finds the files at every load; raises ModelUnavailable.
            spec: what the worker is told to load, beside files, prefix and adapter.
            prefix: what it has read before it counts as ready, as it is at present.
            load_wait: maximum seconds that a request waits for a loading model, if set.
            patience: the same, or the request timeout if that is shorter.
            load_timeout: seconds that a model may load.
            drain_timeout: seconds that a replaced worker has for the requests it still serves.
            on_death: is called with a worker that has ended unexpectedly.
        """
        self.adapter: Path | None = None
        self.together = 1
        self._name = name
        self._locate = locate
        self._spec = spec
        self._prefix = prefix
        self._load_wait = load_wait
        self._patience = patience
        self._load_timeout = load_timeout
        self._drain_timeout = drain_timeout
        self._on_death = on_death
        self._swapping = asyncio.Lock()
        self._state: State = "unloaded"
        self._reason: str | None = None
        self._worker: asyncio.Future[WorkerProcess] | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._swap: asyncio.Task[None] | None = None
        self._draining: set[WorkerProcess] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._restarts = 0
        self._preloaded = False
        self._load_began = 0.0
        self._load_failed = False
        self._next_load = 0.0
        self._died = -math.inf
        self._tokens = 0
        self._closed = False
        self._refuses_waiting = False
        self._look_again = 0.0
        self._missing_reason: str | None = None

    def check_open(self) -> None:
        """Raises ModelUnavailable where it is closing."""
        if self._closed:
            raise _shutting_down()

    def start(self) -> None:
        """Starts to load the model, unless that has begun.

        Raises:
            ModelUnavailable: its files are missing.
        """
        self.check_open()
        if self._supervising is not None and not self._supervising.done():
            return
        self._locate()
        self._worker = asyncio.get_running_loop().create_future()
        self._state, self._reason, self._load_began = "loading", None, time.monotonic()
        self._supervising = start_detached(self._supervise())

    def preload(self) -> None:
        """Starts to load the model, which does not count as ready before it is loaded.

        Raises:
            ModelUnavailable: its files are missing.
        """
        self._preloaded = True
        self.start()

    async def ready(self, by: float) -> WorkerProcess:
        """The worker, as soon as it is ready.

        If a worker dies during the wait and `load_wait` is set, the wait for its replacement is as
        long as for a first load.

        Raises:
            ModelUnavailable: it is not ready by then, or it is certain that it will not be.
        """
        while True:
            if self._supervising is None or self._supervising.done():
                self.check_open()
            future = self._worker
            if future is None:
                raise ModelUnavailable(f"{self._name} is not loaded.", retry_after=1)
            if not future.done():
                self.check_waiting(by)
                until = self._latest(by)
                await asyncio.wait([future], timeout=max(0.0, until - time.monotonic()))
            if not future.done():
                raise self.not_loaded()
            worker = future.result()
            if worker.alive:
                return worker
            # Its end is known here before the supervisor has run.
            await asyncio.sleep(0)

    def check_waiting(self, by: float) -> None:
        """Raises ModelUnavailable if it is useless to wait for the model until then."""
        if self._refuses_waiting and not self.loaded:
            raise _shutting_down()
        if self._state != "failed":
            return
        self._locate()
        # After a failed load, the next one most likely fails too. But a worker that has served
        # before it died is replaced soon.
        if self._load_failed or self._next_load > self._latest(by):
            raise self.not_loaded()

    def _latest(self, by: float) -> float:
        """How long a request waits for a worker: until `by`, or longer if one died during the
        wait."""
        return by if self._load_wait is None else max(by, self._died + self._load_wait)

    @property
    def loaded(self) -> bool:
        """Whether a worker serves requests."""
        return self._state == "ready"

    def not_loaded(self) -> ModelUnavailable:
        """The error for a request that stops waiting for the model."""
        if self._state == "failed":
            return ModelUnavailable(
                f"The {self._name} model is not available: {self._reason}.",
                retry_after=max(1, round(self._next_load - time.monotonic())),
            )
        return ModelUnavailable(f"The {self._name} model is still loading.", retry_after=5)

    def refuse_waiting(self) -> None:
        """Refuses requests that wait for the model to load, from now on; call it when the server
        drains."""
        self._refuses_waiting = True
        if self._worker is not None and not self._worker.done():
            waited_for, self._worker = self._worker, asyncio.get_running_loop().create_future()
            _fail_future(waited_for, _shutting_down())

    async def prepare(self) -> None:
        """Has a prefix that has changed read; see `ModelHost.prepare`."""
        worker = self._live_worker()
        if worker is None or self._prefix is None:
            return
        _, inbox = worker.send("prepare", {"request": asdict(self._prefix())})
        await inbox.get()

    async def swap_adapter(self, adapter: Path | None) -> None:
        """Changes the adapter; see `ModelHost.swap_adapter`."""
        async with self._swapping:
            self.check_open()
            self._locate()
            self._swap = asyncio.create_task(self._load_and_take_over(adapter))
            try:
                await self._swap
            except asyncio.CancelledError:
                # `refuse` cancels the load; otherwise the caller was cancelled.
                self.check_open()
                raise
            except ModelUnavailable as error:
                reason = error.detail
            except OSError as error:
                reason = f"no worker can be started: {error.strerror}"
            else:
                return
        what = "The model without an adapter" if adapter is None else f"The adapter {adapter.name}"
        raise AdapterRejected(f"{what} is refused: {reason}")

    def not_ready(self) -> str | None:
        """Why a request that arrives now would most likely not be served in time; None if it would.

        A lazy model counts as ready while it is unloaded and its files exist, and while its first
        load has not taken longer than a request waits.
        """
        if self._state == "ready":
            return None
        if self._state == "unloaded":
            return self._missing()
        on_demand = self._state == "loading" and self._reason is None and not self._preloaded
        if on_demand and time.monotonic() < self._load_began + self._patience:
            return None
        return self._reason or f"The {self._name} model is loading."

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        missing = self._missing() if self._state == "unloaded" else None
        worker = self._live_worker()
        return {
            "state": self._state if missing is None else "failed",
            "reason": missing or self._reason,
            "model": worker.label if worker else None,
            "adapter": None if self.adapter is None else self.adapter.name,
            "runtime": worker.info["runtime"] if worker else None,
            "device": worker.info["device"] if worker else None,
            "pid": worker.process.pid if worker else None,
            "restarts": self._restarts,
            "completion_tokens_total": self._tokens,
        }

    def refuse(self) -> None:
        """Refuses new requests, starts no worker any more, and cancels a swap."""
        self._closed = True
        if self._swap is not None:
            self._swap.cancel()

    async def close(self) -> None:
        """Ends all workers."""
        self.refuse()
        tasks = [*self._ending]
        for task in (self._supervising, self._swap):
            if task is not None:
                task.cancel()
                tasks.append(task)
        workers = [*self._draining, self._current_worker()]
        await asyncio.gather(*(worker.stop() for worker in workers if worker is not None))
        if tasks:
            await asyncio.wait(tasks)
        if self._worker is not None and not self._worker.done():
            _fail_future(self._worker, _shutting_down())
        self._state = "unloaded"

    async def _load_and_take_over(self, adapter: Path | None) -> None:
        """Loads a new worker and lets it serve; the former one ends after its last request."""
        if self._ending:
            # There is memory for two workers at most, even if swaps follow each other.
            await asyncio.wait(self._ending)
        successor = await self._load(adapter)
        # Nothing is awaited from here on, so that a cancelled swap never leaks a worker.
        former = self._current_worker()
        if self._supervising is not None:
            self._supervising.cancel()
            self._keep_until_done(self._supervising)
        if former is not None:
            self._draining.add(former)
            self._keep_until_done(start_detached(self._drain(former)))
        self.adapter = adapter
        self._serve(successor)
        self._supervising = start_detached(self._supervise(successor))

    async def _drain(self, worker: WorkerProcess) -> None:
        """Stops a replaced worker once it has answered its requests, or at the drain timeout."""
        try:
            async with asyncio.timeout(self._drain_timeout):
                await worker.idle.wait()
        except TimeoutError:
            log.error("a replaced %s worker still serves a request; ending it", self._name)
        if not worker.alive and not worker.stopping:
            self._on_death(worker)
        await worker.stop()
        self._draining.discard(worker)

    def _keep_until_done(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _supervise(self, worker: WorkerProcess | None = None) -> None:
        """Keeps a worker serving until this is cancelled, beginning with `worker` if given."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                if worker is None:
                    self._load_failed = True  # until it has succeeded
                    worker = await self._load(self.adapter)
                    self._serve(worker)
                await worker.ended.wait()
                self._died = time.monotonic()
                reason = f"The {self._name} worker ended ({worker.how_it_ended()})"
                self._on_death(worker)
            except ModelUnavailable as error:
                reason = error.detail
                if isinstance(error, WorkerEnded):
                    self._on_death(error.worker)
            except OSError as error:
                reason = f"The {self._name} worker could not be started: {error.strerror}"
            worker = None
            failures = 0 if time.monotonic() - began > _SETTLED else failures + 1
            delay = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2 ** (failures - 1)) if failures else 0.0
            delay *= random.uniform(0.8, 1.2)
            log.error("%s; starting it again in %.1f s", reason, delay)
            self._fail(reason, delay)
            self._restarts += 1
            await asyncio.sleep(delay)
            self._state = "loading"

    def _serve(self, worker: WorkerProcess) -> None:
        """Lets this worker serve new requests and those that wait for a worker."""
        self._state, self._reason, self._load_failed = "ready", None, False
        self.together = worker.info["together"]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_future()
        self._worker.set_result(worker)

    def _fail(self, reason: str, delay: float) -> None:
        """Tells those who wait for a load why it failed; the next ones wait for the next load."""
        loading, self._worker = self._worker, asyncio.get_running_loop().create_future()
        self._state, self._reason = "failed", reason
        self._next_load = time.monotonic() + delay
        if loading is not None and not loading.done():
            _fail_future(
                loading,
                ModelUnavailable(
                    f"The {self._name} model could not be loaded: {reason}",
                    retry_after=max(1, round(delay)),
                ),
            )

    async def _load(self, adapter: Path | None) -> WorkerProcess:
        """Starts a worker and loads the model; stops the worker if that fails or is cancelled.

        Raises:
            ModelUnavailable: says why.
            OSError: no process can be started.
        """
        files = self._locate()
        prefix = self._prefix_to_read()
        began = time.monotonic()
        name = None if adapter is None else adapter.name
        worker = await WorkerProcess.start(files.label, name, self._count_tokens)
        try:
            async with asyncio.timeout(self._load_timeout):
                await worker.load(
                    {
                        **self._spec,
                        "folder": str(files.folder),
                        "prefix": prefix,
                        "adapter": None if adapter is None else str(adapter),
                    }
                )
        except BaseException as error:
            # It may hang, and it serves no requests.
            worker.process.kill()
            await worker.stop()
            if isinstance(error, TimeoutError):
                raise ModelUnavailable(
                    f"it did not load within {self._load_timeout:g} s (MODEL_LOAD_TIMEOUT_SECONDS)"
                ) from None
            raise
        if (latest := self._prefix_to_read()) != prefix:
            worker.send("prepare", {"request": latest})
        log.info(
            "%s is ready after %.1f s: %s on %s, %s",
            self._name,
            time.monotonic() - began,
            files.label,
            worker.info["runtime"],
            worker.info["device"],
        )
        return worker

    def _prefix_to_read(self) -> dict[str, Any] | None:
        return None if self._prefix is None else asdict(self._prefix())

    def _count_tokens(self, tokens: int) -> None:
        self._tokens += tokens

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

    def _current_worker(self) -> WorkerProcess | None:
        """The worker that serves or has just ended; None before a model has loaded."""
        if self._worker is None or not self._worker.done() or self._worker.exception():
            return None
        return self._worker.result()

    def _live_worker(self) -> WorkerProcess | None:
        worker = self._current_worker()
        return worker if worker is not None and worker.alive else None


def _shutting_down() -> ModelUnavailable:
    return ModelUnavailable("The server is shutting down; try again.", retry_after=5)


def _fail_future(future: asyncio.Future[WorkerProcess], error: ModelUnavailable) -> None:
    future.set_exception(error)
    # If nothing waits for the future, asyncio would report that its exception was never retrieved.
    future.exception()
