"""The journal as the database uses it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.journal import events, rows
from llm_sidecar.journal.claims import Claims
from llm_sidecar.journal.file import JournalFile
from llm_sidecar.journal.outbox import JournalOutbox
from llm_sidecar.journal.requests import Progress
from llm_sidecar.journal.rows import Batch, Entry
from llm_sidecar.journal.writer import JournalWriter


class Journal:
    """The journal in a local folder, which all processes of this machine share.

    Every method that waits raises DatabaseUnavailable if the journal cannot be used now.

    Attributes:
        outbox: its events.
        claims: its requests.
        rows_written: the number of acknowledged rows of this process, without replaced drafts.
    """

    def __init__(self, folder: Path, set_aside: Path, note: Callable[[str], None]) -> None:
        """Does no I/O yet.

        Args:
            set_aside: where damaged files go.
            note: called with each repair, in words, in another thread.
        """
        self._writer = JournalWriter(JournalFile(folder, set_aside, note))
        self.outbox = JournalOutbox(self._writer)
        self._writer.on_change = self.outbox.look
        self.claims = Claims(self._writer, folder / "owners")
        self.rows_written = 0

    def start(self) -> None:
        """Starts to accept rows."""
        self._writer.start()

    async def close(self) -> None:
        """Commits the waiting transactions and closes the file.

        Raises:
            TimeoutError: the disk took too long.
        """
        try:
            await self._writer.close()
        finally:
            self.claims.close()

    def refusal(self) -> str | None:
        """Why it accepts no rows now; None if it does."""
        if self._writer.failure is not None:
            return self._writer.failure
        if not self._writer.is_open:
            return "The database is being opened."
        snapshot = self._writer.snapshot
        if snapshot.rows >= rows.MOST_ROWS or snapshot.row_bytes >= rows.MOST_BYTES:
            return rows.FULL
        return None

    @property
    def failure(self) -> str | None:
        """Why the last commit failed; None if it did not."""
        return self._writer.failure

    @property
    def rows_waiting(self) -> int:
        """Rows of all processes that are not in their tables yet."""
        return self._writer.snapshot.rows

    def status(self) -> dict[str, Any]:
        """Its state for `/health`, as JSON types."""
        found = self._writer.snapshot
        return {
            "accepts_rows": self.refusal() is None,
            "rows": found.rows,
            "bytes": found.row_bytes,
            "most_bytes": rows.MOST_BYTES,
            "oldest_seconds": self._age(found.oldest_row),
            "events": found.events,
            "event_bytes": found.event_bytes,
            "oldest_event_seconds": self._age(found.oldest_event),
            "events_dropped": self._writer.events_dropped,
            "requests": found.requests,
            "request_bytes": found.request_bytes,
            "requests_dropped": self._writer.requests_dropped,
        }

    def _age(self, time: float | None) -> float:
        return 0.0 if time is None else max(0.0, round(self._writer.file.clock.now() - time, 3))

    async def commit(
        self,
        entries: Sequence[Entry] = (),
        new_events: Sequence[CloudEvent] = (),
        progress: Progress | None = None,
        draft: str | None = None,
        replaces: str | None = None,
    ) -> None:
        """Makes rows, events and progress durable, all of them or none; see `Transaction`."""

        def write(db: sqlite3.Connection) -> tuple[int, int, int]:
            now = self._writer.file.clock.now()
            replaced = 0 if replaces is None else rows.delete_draft(db, replaces)
            rows.add(db, entries, now, draft)
            dropped = events.add(db, new_events, now)
            forgotten = 0 if progress is None else self.claims.save(db, progress)
            return replaced, dropped, forgotten

        size = sum(len(entry.data) for entry in entries)
        size += sum(len(event.data) for event in new_events)
        size += 0 if progress is None else len(progress.response or b"")
        replaced, dropped, forgotten = await self._writer.run(write, size)
        self.rows_written += len(entries) - replaced
        self._writer.count_dropped(dropped, forgotten)
        if progress is not None:
            self.claims.saved(progress)

    async def id(self) -> str:
        """The id of the journal in the file; another file has another one."""
        return await self._writer.run(lambda _: self._writer.file.id)

    async def database_id(self) -> str | None:
        """The id that the database had when it was last open; None if it never was."""

        def read(db: sqlite3.Connection) -> str | None:
            found = db.execute("SELECT value FROM meta WHERE name = 'database'").fetchone()
            return None if found is None else str(found[0])

        return await self._writer.run(read)

    async def keep_database_id(self, database_id: str) -> None:
        """Keeps the id of the database, for a start at which it cannot be opened."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('database', ?)", [database_id])

        await self._writer.run(write)

    @property
    def current_id(self) -> str:
        """The id of the journal that was opened last."""
        return self._writer.file.id

    @property
    def ids(self) -> frozenset[str]:
        """The ids of all files that this process has opened."""
        return self._writer.file.ids

    async def opened(self) -> None:
        """Waits until the journal is open, or cannot be opened."""
        await self._writer.run(lambda _: None)

    async def insert(self, entries: Sequence[Entry]) -> None:
        """Adds rows of old logs, even if the journal is full."""
        await self._writer.run(lambda db: rows.insert(db, entries, self._writer.file.clock.now()))

    async def last_movable(self) -> int | None:
        """The id of the newest row that can be moved now; None if there is none."""
        return await self._writer.run(
            lambda db: rows.last_movable(db, self._writer.file.clock.now())
        )

    async def expired_drafts(self) -> list[str]:
        """The ids of the drafts that would be moved now."""
        return await self._writer.run(
            lambda db: rows.expired_drafts(db, self._writer.file.clock.now())
        )

    async def drop_drafts(self, drafts: Iterable[str]) -> None:
        """Deletes the rows of drafts that another machine has replaced."""

        def drop(db: sqlite3.Connection) -> None:
            for draft in drafts:
                rows.delete_draft(db, draft)

        await self._writer.run(drop)

    async def take(self, until: int, most: int) -> tuple[str, Batch] | None:
        """The next batch of rows to move, and the id of the journal that has them."""

        def take(db: sqlite3.Connection) -> tuple[str, Batch] | None:
            found = rows.take(db, self._writer.file.clock.now(), until, most)
            return None if found is None else (self._writer.file.id, found)

        return await self._writer.run(take)

    async def delete(self, journal_id: str, batch: Batch) -> None:
        """Deletes rows that are in their tables, unless another file has replaced the journal."""

        def delete(db: sqlite3.Connection) -> None:
            if self._writer.file.id == journal_id:
                rows.delete(db, batch)

        await self._writer.run(delete)

    async def find(self, target: str, keys: Sequence[str]) -> bytes | None:
        """The columns of a row that is not in its table yet, as JSON; None if there is no such
        row."""
        return await self._writer.run(lambda db: rows.find(db, target, keys))

    async def find_by_column(self, target: str, prefix: str, name: str, value: str) -> bytes | None:
        """The columns of a row, found by the value of one column; see `rows.find_by_column`. Reads
        all rows whose key begins with `prefix`."""
        return await self._writer.run(
            lambda db: rows.find_by_column(db, target, prefix, name, value)
        )
