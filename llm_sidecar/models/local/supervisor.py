"""Keeps one worker process with its model running, and replaces it to change the adapter.

The worker starts when it is first needed, and again with backoff when it ends unexpectedly. If the
model cannot be loaded from its files, no worker starts again until they change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.models.base import Adapter, ModelStatus
from llm_sidecar.models.local.backoff import Backoff
from llm_sidecar.models.local.load_state import LoadState, ModelLimits
from llm_sidecar.models.local.loader import WorkerLoader
from llm_sidecar.models.local.process import UnusableFiles, WorkerEnded, WorkerProcess
from llm_sidecar.models.local.slot import WorkerSlot

log = logging.getLogger(__name__)

_FILES_SECONDS: Final = 1.0
"""Seconds between two checks whether files that cannot be loaded have changed."""


class Supervisor:
    """One serving worker; see the module's docstring.

    A change of the adapter loads a second worker. Once that is ready, new requests go to it, and
    the first worker ends after its last request. So no request waits for a change, and requests
    continue if an adapter loads slowly or crashes its worker.

    Attributes:
        adapter: the adapter in use; set it before `start` to begin with one.
        slot: the worker that serves.
        load_state: whether the model is loaded.
    """

    def __init__(
        self,
        loader: WorkerLoader,
        limits: ModelLimits,
        *,
        preload: bool,
        on_death: Callable[[WorkerProcess], None],
        on_ready: Callable[[], None],
    ) -> None:
        """Starts nothing.

        Args:
            loader: loads the workers.
            limits: bounds of time.
            preload: the model does not count as ready before it is loaded.
            on_death: is called with each worker that ends unexpectedly.
            on_ready: is called when a worker begins to serve.
        """
        self.adapter: Adapter | None = None
        self.slot = WorkerSlot()
        self.load_state = LoadState(loader.name, limits, preload=preload)
        self._loader = loader
        self._limits = limits
        self._on_death = on_death
        self._on_ready = on_ready
        self._backoff = Backoff()
        self._supervision: asyncio.Task[None] | None = None
        self._swap: asyncio.Task[None] | None = None
        self._swap_lock = asyncio.Lock()
        self._ending: dict[asyncio.Task[None], WorkerProcess | None] = {}
        self._draining = False
        self._closed = False

    def check_open(self) -> None:
        """Raises ModelUnavailable after `refuse`."""
        if self._closed:
            raise _shutting_down()

    def start(self) -> None:
        """Starts to load the model, unless that has begun.

        Raises:
            ModelUnavailable: its files are missing.
        """
        self.check_open()
        if self._supervision is not None and not self._supervision.done():
            return
        self._loader.locate()
        self.load_state.begin()
        self._supervision = start_detached(self._supervise(None))

    async def ready(self, by: float) -> WorkerProcess:
        """Waits for the worker to be ready.

        If a worker dies during the wait and `load_wait` is set, the wait for its replacement is as
        long as for a first load.

        Args:
            by: when the wait ends, as `time.monotonic` gives it.

        Raises:
            ModelUnavailable: it is not ready by then, or is unlikely to be.
        """
        while True:
            if self._supervision is None or self._supervision.done():
                self.check_open()
            worker = self.slot.worker
            if worker is None:
                self.check_waiting(by)
                until = self.load_state.wait_until(by)
                worker = await self.slot.wait(until - time.monotonic())
            if worker is None:
                raise self.load_state.error()
            if worker.alive:
                return worker
            # It has ended, but the supervision task has not noticed yet.
            await asyncio.sleep(0)

    def check_waiting(self, by: float) -> None:
        """Raises ModelUnavailable if the model is unlikely to be ready by then."""
        if self._draining and not self.load_state.is_ready:
            raise _shutting_down()
        if self.load_state.state == "failed":
            self._loader.locate()
        if self.load_state.is_hopeless(by):
            raise self.load_state.error()

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        self._draining = True
        if self.slot.worker is None:
            self.slot.empty(_shutting_down())

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Changes the adapter; see `ChatModel.use_adapter`. Cancelling this cancels the change."""
        async with self._swap_lock:
            self.check_open()
            self._loader.locate()
            self._swap = asyncio.create_task(self._replace_worker(adapter))
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

    def go_back(self, adapter: Adapter | None) -> None:
        """Gives up the adapter in use at once: serves no new request until the model is loaded
        again with this one."""
        if self._closed:
            return
        self._release_worker()
        self.adapter = adapter
        self.slot.worker = None
        self.load_state.begin()
        self._supervision = start_detached(self._reload())

    def status(self) -> ModelStatus:
        """The state, without the counts of requests."""
        load = self.load_state
        unloaded = load.state == "unloaded"
        missing = self._loader.missing() if unloaded else None
        worker = self.slot.live_worker
        ready = worker.ready if worker else None
        info = ready.identity if ready else None
        return ModelStatus(
            state=load.state if missing is None else "failed",
            reason=missing or load.reason,
            not_ready=missing if unloaded else load.not_ready(),
            model=worker.label if worker else None,
            adapter=self.adapter,
            runtime=info.runtime if info else None,
            device=info.device if info else None,
            pid=worker.process.pid if worker else None,
            restarts=load.restarts,
            completion_tokens_total=self._loader.tokens,
            speed=ready.speed if ready else None,
            notes=worker.notes if worker else (),
        )

    def refuse(self) -> None:
        """Refuses new requests, starts no more workers, and cancels a change of the adapter."""
        self._closed = True
        if self._swap is not None:
            self._swap.cancel()

    async def close(self) -> None:
        """Ends all workers."""
        self.refuse()
        tasks = [*self._ending]
        for task in (self._supervision, self._swap):
            if task is not None:
                task.cancel()
                tasks.append(task)
        workers = [*self._ending.values(), self.slot.worker]
        await asyncio.gather(*(worker.stop() for worker in workers if worker is not None))
        if tasks:
            await asyncio.wait(tasks)
        self.slot.empty(_shutting_down())
        self.load_state.state = "unloaded"

    async def _replace_worker(self, adapter: Adapter | None) -> None:
        """Loads a new worker, which then serves; the former one ends after its last request."""
        if self._ending:
            # Memory suffices for two workers at most, even if changes follow each other.
            await asyncio.wait(self._ending)
        successor = await self._loader.load(adapter)
        # No await from here on, so that a cancelled change never leaks a worker.
        self._release_worker()
        self.adapter = adapter
        self._serve(successor)
        self._supervision = start_detached(self._supervise(successor))

    def _release_worker(self) -> None:
        """Ends the supervision now, and the worker after its last request."""
        if self._supervision is not None:
            self._supervision.cancel()
            self._keep_until_done(self._supervision, None)
        if (former := self.slot.worker) is not None:
            self._keep_until_done(start_detached(self._retire(former)), former)

    async def _reload(self) -> None:
        """Loads the model once no other worker takes memory."""
        if self._ending:
            await asyncio.wait(self._ending)
        await self._supervise(None)

    async def _retire(self, worker: WorkerProcess) -> None:
        """Stops a replaced worker once it has answered its requests, or at the request timeout."""
        try:
            async with asyncio.timeout(self._limits.request_timeout):
                await worker.idle.wait()
        except TimeoutError:
            log.error("a replaced %s worker still serves a request; ending it", self._loader.name)
        if not worker.alive and not worker.stopping:
            self._on_death(worker)
        await worker.stop()

    def _keep_until_done(self, task: asyncio.Task[None], worker: WorkerProcess | None) -> None:
        self._ending[task] = worker
        task.add_done_callback(self._ending.pop)

    async def _supervise(self, worker: WorkerProcess | None) -> None:
        """Keeps a worker serving until this is cancelled, beginning with `worker` if given."""
        while True:
            began = time.monotonic()
            served = worker is not None
            files = self._loader.file_stats(self.adapter)
            try:
                if worker is None:
                    worker = await self._loader.load(self.adapter)
                    self._serve(worker)
                    served = True
                await worker.ended.wait()
                reason = f"The {self._loader.name} worker ended ({worker.how_it_ended()})"
                self._on_death(worker)
            except UnusableFiles as error:
                await self._wait_for_other_files(error.detail, files)
                continue
            except ModelUnavailable as error:
                reason = error.detail
                if isinstance(error, WorkerEnded):
                    self._on_death(error.worker)
            except OSError as error:
                reason = f"The {self._loader.name} worker could not be started: {error.strerror}"
            worker = None
            await self._pause(reason, time.monotonic() - began, served)

    async def _pause(self, reason: str, lived: float, served: bool) -> None:
        """Fails the requests that wait for a load, and waits for the backoff."""
        delay = self._backoff.delay(lived)
        log.error("%s; starting it again in %.1f s", reason, delay)
        self.load_state.fail(reason, delay, served=served)
        self.slot.empty(
            ModelUnavailable(
                f"The {self._loader.name} model could not be loaded: {reason}",
                retry_after=max(1, round(delay)),
            )
        )
        await asyncio.sleep(delay)
        self.load_state.retry()

    async def _wait_for_other_files(self, reason: str, failed: object) -> None:
        """Fails the requests that wait for a load, and waits until the files have changed.

        Args:
            failed: the `file_stats` of the files that could not be loaded.
        """
        log.error("%s: %s; it is loaded again when its files change", self._loader.name, reason)
        self.load_state.give_up(reason)
        self.slot.empty(self.load_state.error())
        latest = failed
        while True:
            await asyncio.sleep(_FILES_SECONDS)
            previous, latest = latest, self._loader.file_stats(self.adapter)
            # Files that are still being copied differ each time.
            if latest != failed and latest == previous:
                break
        self.load_state.retry()

    def _serve(self, worker: WorkerProcess) -> None:
        self.load_state.ready()
        self.slot.fill(worker)
        self._on_ready()


def _shutting_down() -> ModelUnavailable:
    return ModelUnavailable("The server is shutting down; try again.", retry_after=5)
