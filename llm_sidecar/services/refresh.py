"""Refreshes data in memory from the database, on request and periodically."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.logs import start_detached

log = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 30.0
"""Seconds between two refreshes, because other processes also write to the database."""
_PAUSE: Final = 0.5
"""Minimum seconds between two reads, so that a burst of new rows is read once."""
_RETRY_PAUSE: Final = 1.0


class Refresher:
    """Runs one refresh at a time in the background."""

    def __init__(self, what: str, refresh: Callable[[], Awaitable[None]]) -> None:
        """Starts nothing.

        Args:
            what: the name of the data, for the log.
            refresh: reads the data; raises DatabaseUnavailable if that is not possible now.
        """
        self._what = what
        self._refresh = refresh
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts, with a first refresh."""
        self._task = start_detached(self._run())

    def soon(self) -> None:
        """Requests a refresh within a second."""
        self._asked.set()

    async def close(self) -> None:
        """Stops, and cancels a running refresh."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        logged = None
        while True:
            self._asked.clear()
            try:
                await self._refresh()
            except DatabaseUnavailable as error:
                # Logs each reason once while the database is unavailable.
                if logged != error.detail:
                    log.error("%s cannot be refreshed: %s", self._what, error.detail)
                logged = error.detail
                await asyncio.sleep(_RETRY_PAUSE)
                continue
            except Exception:  # otherwise refreshing would stop for good
                log.exception("%s cannot be refreshed", self._what)
                await asyncio.sleep(_RETRY_PAUSE)
                continue
            logged = None
            await asyncio.sleep(_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._asked.wait()
