"""Swaps of Phi-3's adapter."""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import time
from pathlib import Path

from llm_sidecar import timestamps
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import AdapterRejected, SidecarError
from llm_sidecar.models import adapters
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter, ChatModel
from llm_sidecar.services.events import AdapterSwapped, cloud_event
from llm_sidecar.services.rows import Rows
from llm_sidecar.tasks import TaskSet

log = logging.getLogger(__name__)


class Adapters:
    """Switches Phi-3's adapter."""

    def __init__(
        self, phi3: ChatModel, folder: Path, state: AdapterState, rows: Rows, tasks: TaskSet
    ) -> None:
        """Does no I/O yet.

        Args:
            phi3: the model.
            folder: the folder of dated adapters.
            state: saves the adapter's name for the next start.
            rows: makes the event of a swap durable.
            tasks: run to completion even if the client disconnects.
        """
        self._phi3 = phi3
        self._folder = folder
        self._state = state
        self._rows = rows
        self._tasks = tasks
        self._lock = asyncio.Lock()
        self._last_refusal: tuple[Adapter | None, float, str] = (None, -math.inf, "")

    def date(self) -> datetime.date | None:
        """The date of the adapter in use."""
        adapter = self._phi3.status().adapter
        return None if adapter is None else adapters.adapter_date(adapter.folder)

    async def swap(self, name: str | None = None) -> datetime.date | None:
        """Switches the adapter, saves its name for the next start, and publishes the swap.

        Runs to completion even if the client disconnects.

        Args:
            name: `YYYYMMDD` or `YYYYMMDD-dpo`. Default: the newest adapter, or none if there are
                none.

        Returns:
            The date of the adapter in use.

        Raises:
            AdapterRejected: it cannot be loaded, and the one in use stays.
            ModelUnavailable: Phi-3 is missing, or the server is shutting down.
        """
        await self._tasks.finish(self._swap(name))
        return self.date()

    async def _swap(self, name: str | None) -> None:
        asked = time.monotonic()
        async with self._lock:
            try:
                # In a thread, because the folder may be on a slow disk.
                wanted = await asyncio.to_thread(self._find, name)
                previous = self._phi3.status().adapter
                if wanted != previous:
                    await self._use(wanted, asked)
            except SidecarError as error:
                log.warning("phi3 keeps its adapter: %s", error.detail)
                raise
            await asyncio.to_thread(self._state.save, wanted)
            if wanted != previous:
                await self._publish(wanted, previous)

    async def _use(self, adapter: Adapter | None, asked: float) -> None:
        """Switches to another adapter."""
        refused, when, why = self._last_refusal
        if refused == adapter and when > asked:
            # The client has retried while this adapter was loading, after a timeout.
            raise AdapterRejected(why)
        began, previous = time.monotonic(), self._phi3.status().adapter
        try:
            await self._phi3.use_adapter(adapter)
        except AdapterRejected as error:
            self._last_refusal = adapter, time.monotonic(), error.detail
            raise
        fields = {
            "model": "phi3",
            "previous_adapter": None if previous is None else previous.name,
            "adapter": None if adapter is None else adapter.name,
            "seconds": round(time.monotonic() - began, 1),
        }
        log.info(
            "phi3 changed its adapter from %s to %s in %.1f s",
            fields["previous_adapter"] or "none",
            fields["adapter"] or "none",
            fields["seconds"],
            extra=fields,
        )

    async def _publish(self, adapter: Adapter | None, previous: Adapter | None) -> None:
        swapped = AdapterSwapped(
            adapter=None if adapter is None else adapter.name,
            previous=None if previous is None else previous.name,
            timestamp=timestamps.now(),
        )
        await self._rows.commit(Transaction(events=[cloud_event(swapped)]))

    def _find(self, name: str | None) -> Adapter | None:
        if name is not None:
            return Adapter(adapters.find_adapter_dir(self._folder, name))
        newest = adapters.get_latest_adapter_dir(self._folder)
        return None if newest is None else Adapter(newest)
