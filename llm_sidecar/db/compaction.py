"""Compacts tables when they have many fragments: every batch of rows adds files."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from llm_sidecar.db.lance import one_line
from llm_sidecar.db.rows import TABLES
from llm_sidecar.db.tables import FRAGMENTS, Tables
from llm_sidecar.memory_trim import trim_heap

log = logging.getLogger(__name__)

_PAUSE: Final = 5.0
_SHARE: Final = 20.0
"""The minimum pause between two compactions: in seconds, and as a multiple of the last one's
duration."""
_IDLE_SECONDS: Final = 600.0
"""Seconds from the last added rows until unused versions are deleted."""
_TRIM_SECONDS: Final = 10.0
_COUNT_SECONDS: Final = 5.0


class Compactor:
    """Compacts the tables in the background.

    Attributes:
        fragments: the number of fragments of each table, when last counted.
        last: when a process of this machine last completed a compaction, as of the last count.
        due: set when the next compaction is due.
        failure: why the last compaction failed; None if it did not.
        failures: the number of failed compactions.
        alone: a lock between machines, for tables that several machines share; it yields False if
            another machine compacts.
    """

    def __init__(self) -> None:
        self.fragments: dict[str, int] = {}
        self.last: datetime.datetime | None = None
        self.due = asyncio.Event()
        self.failure: str | None = None
        self.failures = 0
        self.alone: Callable[[], AbstractAsyncContextManager[bool]] = _unshared
        self._busy = asyncio.Lock()
        self._last_rows: float | None = None
        self._last_trim = time.monotonic()

    async def count(self, tables: Tables) -> None:
        """Counts the fragments of every table, and reads the time of the last compaction."""
        try:
            async with asyncio.timeout(_COUNT_SECONDS):
                self.last = await asyncio.to_thread(tables.last_compaction)
                for name in TABLES:
                    self.fragments[name] = await tables.fragments(name)
        except Exception as error:  # noqa: BLE001 lancedb raises many types
            log.warning("the fragments cannot be counted: %s", one_line(error))

    async def rows_added(self, tables: Tables) -> None:
        """Makes a compaction due if a table has many fragments."""
        self._last_rows = time.monotonic()
        await self.count(tables)
        if max(self.fragments.values(), default=0) >= FRAGMENTS:
            self.due.set()

    async def tidy(self) -> None:
        """Returns freed memory to the system. Some time after the last rows, makes one compaction
        due, to delete old versions. Does nothing until rows are added; call it often."""
        now = time.monotonic()
        if self._last_rows is None:
            return
        if now - self._last_trim > _TRIM_SECONDS:
            self._last_trim = now
            await asyncio.to_thread(trim_heap)
        if now - self._last_rows > _IDLE_SECONDS:
            self._last_rows = None
            self.due.set()

    async def run(self, tables: Callable[[], Tables | None], end: asyncio.Event) -> None:
        """Runs each compaction when it is due, until `end` is set.

        Args:
            tables: returns the tables, or None while they are not open.
        """
        while not end.is_set():
            await self.due.wait()
            pause = await self.compact_if_due(tables())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), pause)

    async def compact(self, tables: Tables) -> bool:
        """Compacts now; returns False if another process is compacting.

        Raises:
            Exception: whatever lancedb raises.
        """
        async with self.alone() as mine:
            done = mine and await tables.compact()
        # Merges and compactions free many megabytes, which glibc would keep.
        await asyncio.to_thread(trim_heap)
        await self.count(tables)
        return done

    async def compact_if_due(self, tables: Tables | None) -> float:
        """Compacts if that is due; returns the seconds until the next one may start.

        Args:
            tables: None if they are not open.
        """
        async with self._busy:
            began = time.monotonic()
            if tables is None or not self.due.is_set():
                return _PAUSE
            self.due.clear()
            try:
                await self.compact(tables)
            except Exception as error:  # noqa: BLE001 lancedb raises many types
                log.error("compacting failed, and is tried again later: %s", one_line(error))
                self.failure = one_line(error)
                self.failures += 1
            else:
                self.failure = None
        return max(_PAUSE, _SHARE * (time.monotonic() - began))


@contextlib.asynccontextmanager
async def _unshared() -> AsyncIterator[bool]:
    yield True
