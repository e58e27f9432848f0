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
from llm_sidecar.loader import ModelFiles
from llm_sidecar.logs import start_detached
from llm_sidecar.worker_process import WorkerEnded, WorkerProcess

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
        load_wait: float,
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
            load_wait: seconds for which a request waits for a model that is loading.
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
        self._next_load = 0.0
        self._died = -math.inf
        self._tokens = 0
        self._closed = False
        self._look_again = 0.0
        self._missing_reason: str | None = None

    def check_open(self) -> None:
        """Raises ModelUnavailable where it is closing."""
        if self._closed:
            raise ModelUnavailable("The server is shutting down; try again.", retry_after=5)

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
        self._state, self._reason = "loading", None
        self._supervising = start_detached(self._supervise())

    async def ready(self, by: float) -> WorkerProcess:
        """The worker, as soon as it is ready; ModelUnavailable when it is not by then.

        One that has died meanwhile gets as long to be replaced as one that is loaded first.
        """
        while True:
            if self._supervising is None or self._supervising.done():
                self.check_open()
            future = self._worker
            if future is None:
                raise ModelUnavailable(f"{self._name} is not loaded.", retry_after=1)
            until = max(by, self._died + self._load_wait)
            if not future.done() and self._next_load > until:
                raise ModelUnavailable(
                    f"The {self._name} model is not available: {self._reason}.",
                    retry_after=max(1, round(self._next_load - time.monotonic())),
                )
            if not future.done():
                await asyncio.wait([future], timeout=max(0.0, until - time.monotonic()))
            if not future.done():
                raise ModelUnavailable(f"The {self._name} model is still loading.", retry_after=5)
            worker = future.result()
            if worker.alive:
                return worker
            # Its end is known here before the supervisor has run.
            await asyncio.sleep(0)

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
        refusal = f"{what} is refused: {reason}"
        log.error("%s", refusal)
        raise AdapterRejected(refusal)

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
            self._worker.set_exception(
                ModelUnavailable("The server is shutting down; try again.", retry_after=5)
            )
            self._worker.exception()
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
        self._state, self._reason = "ready", None
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
            loading.set_exception(
                ModelUnavailable(
                    f"The {self._name} model could not be loaded: {reason}",
                    retry_after=max(1, round(delay)),
                )
            )
            loading.exception()

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
