"""Keeps tables in few files: every batch of rows leaves some behind."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from llm_sidecar.db.schema import TABLES
from llm_sidecar.db.tables import FRAGMENTS, Tables
from llm_sidecar.errors import one_line

log = logging.getLogger(__name__)

_PAUSE: Final = 5.0
_SHARE: Final = 20.0
"""Least seconds between two compactions, and how many times as long as the last one took."""
_COUNT_SECONDS: Final = 5.0


class Compactor:
    """Compacts when it is due, and says how that went.

    Attributes:
        fragments: of each table, when last looked at.
        due: set where the next compaction is worth it.
        failure: why the last compaction failed; None if it did not.
        failures: how many have failed.
    """

    def __init__(self) -> None:
        self.fragments: dict[str, int] = {}
        self.due = asyncio.Event()
        self.failure: str | None = None
        self.failures = 0
        self._busy = asyncio.Lock()

    async def look(self, tables: Tables) -> None:
        """Counts the fragments, to be shown, and to see when compacting is worth it."""
        try:
            async with asyncio.timeout(_COUNT_SECONDS):
                for name in TABLES:
                    self.fragments[name] = await tables.fragments(name)
        except Exception as error:  # noqa: BLE001 lancedb raises many types
            log.warning("the fragments cannot be counted: %s", one_line(error))

    def ask_if_many(self) -> None:
        """Makes a compaction due where a table has many fragments."""
        if max(self.fragments.values(), default=0) >= FRAGMENTS:
            self.due.set()

    async def compact(self, tables: Tables) -> bool:
        """Compacts now; returns False where another process is at it.

        Raises:
            Exception: whatever lancedb raises.
        """
        done = await tables.compact()
        await self.look(tables)
        return done

    async def compact_if_due(self, tables: Tables | None) -> float:
        """Compacts if that is due; returns seconds until the next one may begin.

        Args:
            tables: None where they are not open.
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
