"""Claims of requests: one process at a time answers a request with an `Idempotency-Key`."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llm_sidecar.errors import DatabaseUnavailable, RequestKeyReused
from llm_sidecar.journal import requests
from llm_sidecar.journal.owner import Owner
from llm_sidecar.journal.requests import Claim, Progress, RequestKey
from llm_sidecar.journal.writer import JournalUnavailable, JournalWriter
from llm_sidecar.logs import start_detached

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.1
"""Seconds between two polls of a request that another process answers."""


@dataclass(slots=True)
class _Mine:
    """A request that this process answers now, or tries to claim."""

    fingerprint: str
    is_claimed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Claims:
    """The requests that this process answers."""

    def __init__(self, writer: JournalWriter, owners: Path) -> None:
        """Does no I/O yet.

        Args:
            owners: the folder with a lock file for each live process.
        """
        self._writer = writer
        self._owner = Owner(owners)
        self._mine: dict[RequestKey, _Mine] = {}

    async def claim(self, request: RequestKey, fingerprint: str) -> Claim:
        """See `Store.claim`."""
        while True:
            if (mine := self._mine.get(request)) is not None:
                if mine.is_claimed and mine.fingerprint != fingerprint:
                    raise RequestKeyReused(requests.REUSED)
                await mine.ended.wait()
                continue
            found = await self._try(request, fingerprint)
            if found is not None:
                return found
            await asyncio.sleep(_POLL_SECONDS)

    async def _try(self, request: RequestKey, fingerprint: str) -> Claim | None:
        mine = self._mine[request] = _Mine(fingerprint)
        try:
            found = await self._writer.run(lambda db: self._claim(db, request, fingerprint))
        except RequestKeyReused:
            self._end(request)
            raise
        except BaseException:
            # The claim may still succeed, although its caller no longer answers the request.
            start_detached(self._give_up(request))
            raise
        if found is None or found.response is not None:
            self._end(request)
        mine.is_claimed = True
        return found

    def _claim(self, db: sqlite3.Connection, request: RequestKey, fingerprint: str) -> Claim | None:
        now, owner = self._writer.file.clock.now(), self._owner
        try:
            owner.enter()
            return requests.claim(db, request, fingerprint, owner.id, owner.is_alive, now)
        except OSError as error:
            raise JournalUnavailable(f"The request cannot be claimed: {error.strerror}.") from None

    async def state(self, request: RequestKey) -> str | None:
        """See `Store.request_state`."""
        return await self._writer.run(lambda db: requests.state(db, request))

    async def release(self, request: RequestKey) -> None:
        """See `Store.release`."""
        try:
            await self._writer.run(lambda db: requests.release(db, request, self._owner.id))
        finally:
            self._end(request)

    async def _give_up(self, request: RequestKey) -> None:
        try:
            await self.release(request)
        except DatabaseUnavailable as error:
            log.warning("a request stays claimed until this process ends: %s", error.detail)

    def save(self, db: sqlite3.Connection, progress: Progress) -> int:
        """Stores progress, in a transaction; returns how many old requests were dropped for it."""
        fingerprint = self._mine[progress.request].fingerprint
        now = self._writer.file.clock.now()
        return requests.save(db, progress, fingerprint, self._owner.id, now)

    def saved(self, progress: Progress) -> None:
        """Ends the claim of a request that has its response."""
        if progress.response is not None:
            self._end(progress.request)

    def _end(self, request: RequestKey) -> None:
        if (mine := self._mine.pop(request, None)) is not None:
            mine.ended.set()

    def close(self) -> None:
        """Releases all requests of this process."""
        self._owner.leave()
