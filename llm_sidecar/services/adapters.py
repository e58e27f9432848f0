"""Phi-3's adapter, which all sidecars of one Redis agree on.

The adapter in use is a fact in Redis. The sidecar that swaps it tries the adapter first, then
replaces the fact, and the others follow, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import time
from pathlib import Path
from typing import Final

from redis.exceptions import NoPermissionError, RedisError

from llm_sidecar import timestamps
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import AdapterRejected, SidecarError, Unavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.models import adapters
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter, ChatModel
from llm_sidecar.services.events import AdapterSwapped, cloud_event
from llm_sidecar.services.redis_errors import as_unavailable
from llm_sidecar.services.refresh import Refresher
from llm_sidecar.services.rows import Rows
from llm_sidecar.services.shared_adapter import (
    FACT,
    Agreed,
    SharedAdapter,
    adapter_at_start,
    adapter_named,
)
from llm_sidecar.tasks import TaskSet

_AGAIN_SECONDS: Final = 1.0
"""Seconds after which a swap that could not be followed, because Redis failed, is tried again."""

log = logging.getLogger(__name__)


class Adapters:
    """Switches Phi-3's adapter.

    Attributes:
        problem: why this sidecar does not use the adapter that the others use; None if it does.
    """

    def __init__(
        self,
        phi3: ChatModel,
        folder: Path,
        state: AdapterState,
        rows: Rows,
        tasks: TaskSet,
        bus: EventBus,
    ) -> None:
        """Does no I/O yet.

        Args:
            phi3: the model.
            folder: the folder of dated adapters.
            state: saves the adapter's name for a start without Redis.
            rows: keeps the event of a swap if Redis denies a part of it.
            tasks: run to completion even if the client disconnects.
            bus: has the adapter that the sidecars agree on.
        """
        self.problem: str | None = None
        self._phi3 = phi3
        self._folder = folder
        self._state = state
        self._rows = rows
        self._tasks = tasks
        self._bus = bus
        self._shared = SharedAdapter(bus.facts)
        self._lock = asyncio.Lock()
        self._last_refusal: tuple[Adapter | None, float, str] = (None, -math.inf, "")
        self._follower = Refresher("the adapter in use", self._follow)

    async def at_start(self) -> Adapter | None:
        """The adapter to start with: that of the other sidecars, or if there is none, that of the
        last run."""
        try:
            return await adapter_at_start(self._shared, self._state, self._folder)
        except AdapterRejected:
            # `problem` says so once the model runs.
            return await asyncio.to_thread(self._state.load)

    def start(self) -> None:
        """Starts to follow swaps by other sidecars; call it after the model has started."""
        self._bus.watcher.watch(FACT, lambda _: self._follower.soon())
        self._follower.start()

    async def close(self) -> None:
        """Stops following."""
        await self._follower.close()

    def date(self) -> datetime.date | None:
        """The date of the adapter in use."""
        adapter = self._phi3.status().adapter
        return None if adapter is None else adapters.adapter_date(adapter.folder)

    async def swap(self, name: str | None = None) -> datetime.date | None:
        """Switches the adapter of all sidecars, and publishes the swap.

        Returns once this sidecar uses it; the others follow. Runs to completion even if the client
        disconnects.

        Args:
            name: `YYYYMMDD` or `YYYYMMDD-dpo`. Default: the newest adapter, or none if there are
                none.

        Returns:
            The date of the adapter in use.

        Raises:
            AdapterRejected: it cannot be loaded, and the one in use stays.
            ModelUnavailable: Phi-3 is missing, or the server is shutting down.
            Unavailable: Redis does not answer, so the sidecars cannot agree; the adapter in use
                stays.
        """
        await self._tasks.finish(self._swap(name))
        return self.date()

    async def _swap(self, name: str | None) -> None:
        asked = time.monotonic()
        async with self._lock:
            try:
                with as_unavailable("the adapter in use"):
                    await self._shared.get()
                # In a thread, because the folder may be on a slow disk.
                wanted = await asyncio.to_thread(self._find, name)
                previous = self._phi3.status().adapter
                await self._use(wanted, asked)
                await self._agree(wanted, previous)
            except SidecarError as error:
                log.warning("phi3 keeps its adapter: %s", error.detail)
                raise
            self.problem = None
            await asyncio.to_thread(self._state.save, wanted)

    async def _agree(self, wanted: Adapter | None, previous: Adapter | None) -> None:
        """Sets the adapter of all sidecars, unless it is set already.

        Args:
            previous: to which this sidecar goes back if that fails.
        """
        try:
            with as_unavailable("the adapter in use"):
                while True:
                    agreed = await self._shared.get()
                    before = agreed.adapter if agreed.known else _name(previous)
                    if agreed.known and before == _name(wanted):
                        return
                    if await self._replace(agreed, _swapped(wanted, before)):
                        return
        except Unavailable:
            with contextlib.suppress(SidecarError):
                await self._use(previous, time.monotonic())
            raise

    async def _replace(self, agreed: Agreed, swapped: AdapterSwapped) -> bool:
        """Replaces what the sidecars agree on, and publishes the swap, if it is one."""
        if swapped.adapter == swapped.previous:
            return await self._shared.replace(agreed, swapped)
        event = cloud_event(swapped)
        try:
            return await self._shared.replace(agreed, swapped, event)
        except NoPermissionError:
            # Redis may deny the stream or the channel alone. An event of the journal goes to the
            # other one.
            replaced = await self._shared.replace(agreed, swapped)
            if replaced:
                await self._rows.commit(Transaction(events=[event]))
            return replaced

    async def _follow(self) -> None:
        """Uses the adapter that the sidecars agree on. If this one cannot load it, it keeps its own
        and tries again later."""
        problem = None
        try:
            if not await self._is_followed():
                # One sidecar after the other loads it. Without the lease, several do at once.
                async with self._bus.leases.held(FACT, wait=True), self._lock:
                    await self._use_agreed()
        except RedisError:
            # The watcher reports no change if this one alone could not be followed.
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._follower.soon)
            return
        except SidecarError as error:
            problem = error.detail
            if problem != self.problem:
                log.error("phi3 keeps its adapter: %s", problem)
        self.problem = problem

    async def _is_followed(self) -> bool:
        """Whether this sidecar uses the adapter that all agree on; proposes its own if there is
        none."""
        agreed, own = await self._shared.get(), self._phi3.status().adapter
        if not agreed.known:
            # If another sidecar is faster, the watcher reports its adapter.
            await self._shared.replace(agreed, _swapped(own, None))
            return True
        return agreed.adapter == _name(own)

    async def _use_agreed(self) -> None:
        if (agreed := await self._shared.get()).known:
            wanted = await asyncio.to_thread(adapter_named, self._folder, agreed.adapter)
            await self._use(wanted, time.monotonic())
            await asyncio.to_thread(self._state.save, wanted)

    async def _use(self, adapter: Adapter | None, asked: float) -> None:
        """Switches to another adapter; does nothing if it is in use.

        Args:
            asked: when this was asked for.
        """
        if adapter == (previous := self._phi3.status().adapter):
            return
        refused, when, why = self._last_refusal
        if refused == adapter and when > asked:
            # The client has retried while this adapter was loading, after a timeout.
            raise AdapterRejected(why)
        began = time.monotonic()
        try:
            await self._phi3.use_adapter(adapter)
        except AdapterRejected as error:
            self._last_refusal = adapter, time.monotonic(), error.detail
            raise
        fields = {
            "model": "phi3",
            "previous_adapter": _name(previous),
            "adapter": _name(adapter),
            "seconds": round(time.monotonic() - began, 1),
        }
        log.info(
            "phi3 changed its adapter from %s to %s in %.1f s",
            fields["previous_adapter"] or "none",
            fields["adapter"] or "none",
            fields["seconds"],
            extra=fields,
        )

    def _find(self, name: str | None) -> Adapter | None:
        if name is not None:
            return Adapter(adapters.find_adapter_dir(self._folder, name))
        newest = adapters.get_latest_adapter_dir(self._folder)
        return None if newest is None else Adapter(newest)


def _name(adapter: Adapter | None) -> str | None:
    return None if adapter is None else adapter.name


def _swapped(adapter: Adapter | None, previous: str | None) -> AdapterSwapped:
    return AdapterSwapped(adapter=_name(adapter), previous=previous, timestamp=timestamps.now())
