"""The worker that serves a model, and the requests that wait for one."""

from __future__ import annotations

import asyncio

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.local.process import WorkerProcess


class WorkerSlot:
    """Holds one worker.

    Attributes:
        worker: serves requests, or has just ended; None while none is loaded.
    """

    def __init__(self) -> None:
        self.worker: WorkerProcess | None = None
        self._next: asyncio.Future[WorkerProcess] | None = None

    @property
    def live_worker(self) -> WorkerProcess | None:
        """The worker, unless it has ended."""
        return self.worker if self.worker is not None and self.worker.alive else None

    def fill(self, worker: WorkerProcess) -> None:
        """Assigns this worker to all waiting and new requests."""
        self.worker = worker
        if self._next is not None:
            self._next.set_result(worker)
            self._next = None

    def empty(self, error: ModelUnavailable) -> None:
        """Fails all waiting requests; new ones wait for the next worker."""
        self.worker = None
        if self._next is not None:
            self._next.set_exception(error)
            # If nothing waits, asyncio would report that this exception was never retrieved.
            self._next.exception()
            self._next = None

    async def wait(self, seconds: float) -> WorkerProcess | None:
        """The next worker; None if there is none within this time.

        Raises:
            ModelUnavailable: `empty` was called with it.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        waiting = self._next
        await asyncio.wait([waiting], timeout=max(0.0, seconds))
        return waiting.result() if waiting.done() else None
