"""Keeps one worker process with its model running, and changes what it holds.

The worker is started when it is first needed, and again with backoff when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.loader import ModelFiles
from llm_sidecar.worker_process import WorkerEnded, WorkerProcess

log = logging.getLogger(__name__)

State = Literal["unloaded", "loading", "ready", "failed"]
NothingRuns = Callable[[], AbstractAsyncContextManager[None]]
"""Gives a context in which no request is at the worker."""

_LOOK_SECONDS: Final = 0.2
"""Seconds for which it is known whether a model's files are there."""
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 30.0
_SETTLED: Final = 60.0
"""Seconds after which a worker counts as healthy, and the next failure starts the backoff anew."""


class Supervisor:
    """One worker at a time; see the module's docstring.

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
        on_death: Callable[[str], None],
    ) -> None:
        """Starts nothing.

        Args:
            name: `phi3` or `hermes`.
            locate: finds the files at every load; raises ModelUnavailable.
            spec: what the worker is told to load, beside files, prefix and adapter.
            prefix: what it has read before it counts as ready, as it is at present.
            load_wait: seconds for which a request waits for a model that is loading.
            load_timeout: seconds that a model may load.
            on_death: hears how a worker ended that nobody asked to.
        """
        self.adapter: Path | None = None
        self.together = 1
        self._name = name
        self._locate = locate
        self._spec = spec
        self._prefix = prefix
        self._load_wait = load_wait
        self._load_timeout = load_timeout
        self._on_death = on_death
        self._swapping = asyncio.Lock()
        self._successor: WorkerProcess | None = None
        self._state: State = "unloaded"
        self._reason: str | None = None
        self._worker: asyncio.Future[WorkerProcess] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._restarts = 0
        self._next_load = 0.0
        self._died = -math.inf
        self._tokens_before = 0
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
        if self._keeping is not None and not self._keeping.done():
            return
        self._locate()
        self._worker = asyncio.get_running_loop().create_future()
        self._state, self._reason = "loading", None
        # It outlives the request that was the first, so it does not log in its name.
        self._keeping = asyncio.create_task(self._supervise(), context=contextvars.Context())

    async def ready(self, by: float) -> WorkerProcess:
        """The worker, as soon as it is ready; ModelUnavailable when it is not by then.

        One that has died meanwhile gets as long to be replaced as one that is loaded first.
        """
        while True:
            if self._keeping is None or self._keeping.done():
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

    async def swap_adapter(self, adapter: Path | None, nothing_runs: NothingRuns) -> None:
        """Changes the adapter; see `ModelHost.swap_adapter`."""
        async with self._swapping:
            self.start()
            by = time.monotonic() + self._load_timeout
            loads = True
            try:
                await self.ready(by)
            except ModelUnavailable:
                if adapter == self.adapter:
                    raise
                # It may be the adapter in use that keeps the model from being loaded.
                loads = False
            try:
                if not loads:
                    await self._begin_anew(adapter, by)
                elif adapter is None or self.adapter is None:
                    await self._hand_over(adapter, nothing_runs, by)
                else:
                    await self._swap_within(adapter, nothing_runs, by)
            except AdapterRejected as error:
                which = (
                    "The model without an adapter"
                    if adapter is None
                    else f"The adapter {adapter.name}"
                )
                raise AdapterRejected(f"{which} is refused: {error.detail}") from None

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
            "adapter": self.adapter_name(),
            "runtime": worker.info["runtime"] if worker else None,
            "device": worker.info["device"] if worker else None,
            "pid": worker.process.pid if worker else None,
            "restarts": self._restarts,
            "completion_tokens_total": self._tokens_before + (worker.tokens if worker else 0),
        }

    def adapter_name(self) -> str | None:
        """What the adapter in use is called."""
        return None if self.adapter is None else self.adapter.name

    def refuse(self) -> None:
        """Starts nothing any more, and lets nobody in."""
        self._closed = True

    async def close(self) -> None:
        """Ends the worker."""
        self.refuse()
        await self._stop_keeping()
        if self._successor is not None:
            await self._successor.stop()
        if self._worker is not None and not self._worker.done():
            self._worker.set_exception(
                ModelUnavailable("The server is shutting down; try again.", retry_after=5)
            )
            self._worker.exception()
        self._state = "unloaded"

    async def _swap_within(self, adapter: Path, nothing_runs: NothingRuns, by: float) -> None:
        """Has a worker, which has an adapter, take another between two requests."""
        async with nothing_runs():
            # The one that was there before may have died meanwhile, and would never answer.
            worker = await self.ready(by)
            _, inbox = worker.send("adapter", {"folder": str(adapter)})
            try:
                async with asyncio.timeout(self._load_timeout):
                    message = await inbox.get()
            except TimeoutError:
                worker.process.kill()
                raise AdapterRejected(f"it did not load within {self._load_timeout:g} s") from None
            if message["op"] == "error":
                reason = message.get("detail") or f"its worker ended: {message['died']}"
                raise AdapterRejected(reason)
            self.adapter = adapter

    async def _hand_over(self, adapter: Path | None, nothing_runs: NothingRuns, by: float) -> None:
        """Loads the model with the adapter in a worker beside the one that runs, and switches.

        A model that is loaded without one has no room for adapters, and is faster for it.
        """
        successor = await self._loaded_successor(adapter)
        handed_over = False
        try:
            # The next request meets the successor.
            async with nothing_runs():
                replaced = await self.ready(by)
                self._successor, self.adapter = successor, adapter
                handed_over = True
                self._worker = asyncio.get_running_loop().create_future()
                await replaced.stop()
                await self.ready(by)
        finally:
            if not handed_over:
                await successor.stop()

    async def _begin_anew(self, adapter: Path | None, by: float) -> None:
        """Loads the model with the adapter where it does not load with the one in use."""
        successor = await self._loaded_successor(adapter)
        await self._stop_keeping()
        self._fail("it is loaded with another adapter", 0.0)
        self._successor, self.adapter = successor, adapter
        self.start()
        await self.ready(by)

    async def _loaded_successor(self, adapter: Path | None) -> WorkerProcess:
        try:
            return await self._loaded_worker(adapter)
        except ModelUnavailable as error:
            raise AdapterRejected(error.detail) from None
        except OSError as error:
            raise AdapterRejected(f"no worker can be started: {error.strerror}") from None

    async def _stop_keeping(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])

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
                    reason = f"The {self._name} worker ended ({worker.how_it_ended()})"
                if self._successor is not None:
                    continue
                self._on_death(worker.how_it_ended())
            except ModelUnavailable as error:
                reason = error.detail
                if isinstance(error, WorkerEnded):
                    self._on_death(error.how)
            except OSError as error:
                reason = f"The {self._name} worker could not be started: {error.strerror}"
            failures = 0 if time.monotonic() - began > _SETTLED else failures + 1
            delay = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2 ** (failures - 1)) if failures else 0.0
            delay *= random.uniform(0.8, 1.2)
            log.error("%s; starting it again in %.1f s", reason, delay)
            self._fail(reason, delay)
            self._restarts += 1
            await asyncio.sleep(delay)
            self._state = "loading"

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

    @contextlib.asynccontextmanager
    async def _running_worker(self) -> AsyncGenerator[WorkerProcess, None]:
        successor, self._successor = self._successor, None
        worker = successor or await self._loaded_worker(self.adapter)
        try:
            self._state, self._reason = "ready", None
            self.together = worker.info["together"]
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
            async with asyncio.timeout(self._load_timeout):
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
                raise ModelUnavailable(f"it did not load within {self._load_timeout:g} s") from None
            raise
        log.info(
            "%s is ready after %.1f s: %s on %s, %s",
            self._name,
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

    def _live_worker(self) -> WorkerProcess | None:
        if self._worker is None or not self._worker.done() or self._worker.exception():
            return None
        worker = self._worker.result()
        return worker if worker.alive else None
