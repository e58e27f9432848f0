"""The events of the journal, as the relay sends them to Redis."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal import events
from llm_sidecar.journal.locks import held
from llm_sidecar.journal.writer import JournalWriter

if TYPE_CHECKING:
    from llm_sidecar.event_bus.outbox import Queued

_LOCK: Final = "relay.lock"


class JournalOutbox:
    """Implements `event_bus.outbox.Outbox`; its methods raise DatabaseUnavailable.

    Attributes:
        id: the id of the journal that the last `head` has read. It changes if the file is replaced.
    """

    def __init__(self, writer: JournalWriter) -> None:
        self.id = ""
        self.filled = asyncio.Event()
        self._writer = writer
        self._newest = 0

    def look(self) -> None:
        """Sets `filled` if events were added since the last call."""
        newest = self._writer.snapshot.newest_event
        if newest != self._newest and newest:
            self.filled.set()
        self._newest = newest

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[bool]:
        """See `Outbox`."""
        # Waits until the journal is open, so that the folder of the lock exists.
        await self._writer.run(lambda _: None)
        lock = held(self._writer.file.folder / _LOCK, wait=False)
        async with AsyncExitStack() as stack:
            try:
                mine = await stack.enter_async_context(lock)
            except OSError as error:
                raise DatabaseUnavailable(
                    f"The events cannot be locked: {error.strerror}"
                ) from None
            yield mine

    async def head(self, count: int) -> Sequence[Queued]:
        """See `Outbox`."""
        self.id, found = await self._writer.run(
            lambda db: (self._writer.file.id, events.head(db, count))
        )
        return found

    async def sent(self, number: int) -> None:
        """See `Outbox`."""
        read_from = self.id

        def delete(db: sqlite3.Connection) -> None:
            if self._writer.file.id == read_from:
                events.delete(db, number)

        await self._writer.run(delete)
