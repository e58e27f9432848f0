"""Refreshes data in memory from the database, on request and periodically."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.tasks import cancel

log = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 30.0
"""Seconds between two refreshes, because other processes also write to the database."""
_PAUSE: Final = 0.5
"""Minimum seconds between two reads, so that a burst of new rows is read once."""
_RETRY_PAUSE: Final = 1.0
_CANCEL_SECONDS: Final = 5.0
_SLICE: Final = 2.0
"""Seconds after which `Refresher` asks again how long to wait."""


class Refresher:
    """Runs one refresh at a time in the background."""

    def __init__(
        self,
        what: str,
        refresh: Callable[[], Awaitable[None]],
        every: Callable[[], float] = lambda: REFRESH_SECONDS,
    ) -> None:
        """Starts nothing.

        Args:
            what: the name of the data, for the log.
            refresh: reads the data; raises DatabaseUnavailable if that is not possible now.
            every: returns the seconds between two refreshes; the value may change.
        """
        self._what = what
        self._refresh = refresh
        self._every = every
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
            await cancel(self._task, patience=_CANCEL_SECONDS)

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
            await self._wait()

    async def _wait(self) -> None:
        """Returns when a refresh is requested or due."""
        began = time.monotonic()
        while not self._asked.is_set() and (rest := began + self._every() - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(rest, _SLICE)):
                    await self._asked.wait()
