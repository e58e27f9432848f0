"""Several workers of one model, each with a supervisor of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.supervisor import Supervisor
from llm_sidecar.models.replica_status import combined
from llm_sidecar.models.status import Adapter, ModelStatus
from llm_sidecar.tasks import first_success


class Replicas:
    """The workers of one model; see the module's docstring.

    They load one after the other, so that the first one serves as soon as if it were alone.
    """

    def __init__(self, supervisors: Sequence[Supervisor], load_timeout: float) -> None:
        """Starts nothing.

        Args:
            supervisors: at least one.
            load_timeout: see `ModelLimits`.
        """
        self._supervisors = supervisors
        self._load_timeout = load_timeout
        self._starting: asyncio.Task[None] | None = None
        self._swap_lock = asyncio.Lock()

    def live(self) -> list[WorkerProcess]:
        """The workers that serve now."""
        workers = (supervisor.slot.live_worker for supervisor in self._supervisors)
        return [worker for worker in workers if worker is not None]

    def capacity(self) -> int:
        """The number of requests that they run at the same time."""
        return sum(worker.ready.capacity for worker in self.live() if worker.ready is not None)

    def check_open(self) -> None:
        """Raises ModelUnavailable after `refuse`."""
        self._supervisors[0].check_open()

    def start(self, adapter: Adapter | None) -> None:
        """Begins with this adapter; loads nothing."""
        for supervisor in self._supervisors:
            supervisor.adapter = adapter

    def load(self) -> None:
        """Starts to load the model, unless that has begun.

        Raises:
            ModelUnavailable: its files are missing.
        """
        first, *others = self._supervisors
        first.start()
        if self._starting is None:
            self._starting = start_detached(self._load_others())
        elif self._starting.done():
            for supervisor in others:
                _start(supervisor)

    def check_waiting(self, by: float) -> None:
        """Raises ModelUnavailable if none is likely to be ready by then."""
        errors: list[ModelUnavailable] = []
        for supervisor in self._supervisors:
            try:
                supervisor.check_waiting(by)
            except ModelUnavailable as error:
                errors.append(error)
            else:
                return
        raise errors[0]

    async def ready(self, by: float) -> list[WorkerProcess]:
        """The workers that serve, at least one; waits until one is ready.

        Args:
            by: when the wait ends, as `time.monotonic` gives it.

        Raises:
            ModelUnavailable: none is ready by then, or is likely to be.
        """
        while not (workers := self.live()):
            await first_success(*(supervisor.ready(by) for supervisor in self._supervisors))
        return workers

    def load_error(self) -> ModelUnavailable | None:
        """Why no worker serves; None if one does."""
        if any(supervisor.load_state.is_ready for supervisor in self._supervisors):
            return None
        return self._supervisors[0].load_state.error()

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Changes the adapter of one after the other; see `ChatModel.use_adapter`.

        If one of them refuses it, or this is cancelled, those that have changed load the former
        adapter again.
        """
        async with self._swap_lock:
            former = [supervisor.adapter for supervisor in self._supervisors]
            try:
                for supervisor in self._supervisors:
                    await supervisor.use_adapter(adapter)
            except BaseException:
                for supervisor, before in zip(self._supervisors, former, strict=True):
                    # One may have changed although its call was cancelled.
                    if supervisor.adapter != before:
                        supervisor.go_back(before)
                raise

    def status(self) -> ModelStatus:
        """The state of all, without the counts of requests."""
        statuses = [supervisor.status() for supervisor in self._supervisors]
        return statuses[0] if len(statuses) == 1 else combined(statuses)

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        for supervisor in self._supervisors:
            supervisor.drain()

    def refuse(self) -> None:
        """Refuses new requests, starts no more workers, and cancels a change of the adapter."""
        if self._starting is not None:
            self._starting.cancel()
        for supervisor in self._supervisors:
            supervisor.refuse()

    async def close(self) -> None:
        """Ends all workers."""
        self.refuse()
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors))

    async def _load_others(self) -> None:
        for former, supervisor in itertools.pairwise(self._supervisors):
            with contextlib.suppress(ModelUnavailable):
                await former.ready(time.monotonic() + self._load_timeout)
            _start(supervisor)


def _start(supervisor: Supervisor) -> None:
    # The status says what is missing.
    with contextlib.suppress(ModelUnavailable):
        supervisor.start()
