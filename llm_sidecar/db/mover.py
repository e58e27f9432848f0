"""Moves rows from the journal to LanceDB, in batches; one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from llm_sidecar.db.compaction import Compactor
from llm_sidecar.db.encoding import decoded, keep
from llm_sidecar.db.lance import one_line
from llm_sidecar.db.location import Location
from llm_sidecar.db.old_log import OldLogs
from llm_sidecar.db.rows import FEEDBACK, WITHDRAWALS
from llm_sidecar.db.tables import MOVING, Tables, open_tables
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.locks import held
from llm_sidecar.journal.writer import JournalUnavailable
from llm_sidecar.logs import start_detached

log = logging.getLogger(__name__)

_MOVE_EVERY: Final = 1.0
"""Seconds between two batches, because every batch adds files. A query or many waiting rows start
one at once."""
_MOVE_EVERY_REMOTE: Final = 5.0
_GATHER_SECONDS: Final = 0.5
"""Seconds for which feedback waits for more of it, so that a burst is one batch."""
_MOVE_ROWS: Final = 10_000
_STALLED_SECONDS: Final = 10.0
"""After this time a write counts as stalled. The mover still waits for it."""
_BACKOFF_FIRST: Final = 0.5
_BACKOFF_MOST: Final = 30.0
_OPEN_SECONDS: Final = 60.0
_MOST_REPAIRS: Final = 20
_CLOSE_SECONDS: Final = 10.0
_ID_SECONDS: Final = 2.0
"""How long the first event of a new machine waits for the id of the database."""


class Mover:
    """The only writer of this process to LanceDB.

    Attributes:
        tables: None until the database is open.
        state: `opening`, `open`, `away` (LanceDB is unavailable; the journal still accepts rows) or
            `closed`.
        reason: why the state is `away`; None otherwise.
        compactor: compacts the tables.
        repairs: what was repaired last, in words.
        database_id: the database's own id; None until it is known.
        on_feedback: is called after feedback, or a withdrawal, has reached its table.
        opening: a lock for creating tables; see `Store.share`.
    """

    def __init__(self, location: Location, journal: Journal, *, create: bool = True) -> None:
        """Does no I/O yet; see `start`."""
        self.tables: Tables | None = None
        self.state = "opening"
        self.reason: str | None = None
        self.compactor = Compactor()
        self.repairs: deque[str] = deque(maxlen=_MOST_REPAIRS)
        self.database_id: str | None = None
        self.on_feedback: Callable[[], None] = lambda: None
        self.opening: Callable[[], AbstractAsyncContextManager[object]] = contextlib.nullcontext
        self._failure: DatabaseUnavailable | None = None
        self._location = location
        self._journal = journal
        self._create = create
        self._every = _MOVE_EVERY if location.folder is not None else _MOVE_EVERY_REMOTE
        self._old_logs = OldLogs(location, journal, self.note)
        self._asked = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._changed = asyncio.Condition()
        self._begun = self._done = 0
        self._end = asyncio.Event()
        self._in_flight: asyncio.Future[Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts to open the database and to move rows."""
        if self._create:
            self._journal.start()
        self._tasks = [
            start_detached(self._keep_moving()),
            start_detached(self.compactor.run(lambda: self.tables, self._end)),
        ]

    def note(self, done: str) -> None:
        """Records a repair."""
        log.warning("%s", done)
        self.repairs.append(done)

    async def opened(self, seconds: float) -> Tables:
        """Waits for the tables.

        Raises:
            DatabaseUnavailable: they are not open within `seconds`, or the last attempt failed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.tables or self._failure)
        if self.tables is None:
            raise self._failure or DatabaseUnavailable(
                f"The database at {self._location.shown} cannot be opened: it took longer than "
                f"{seconds:g} s; check LANCEDB_URI.",
                retry_after=5,
            )
        return self.tables

    async def known_id(self) -> str | None:
        """The id of the database, also if it cannot be opened; None if it has never been open.

        Raises:
            DatabaseUnavailable: the journal cannot be used.
        """
        if self.database_id is None:
            kept = await self._journal.database_id()
            if kept is None and self._location.folder is None:
                # Other machines do not know the id of this journal.
                with contextlib.suppress(DatabaseUnavailable):
                    await self.opened(_ID_SECONDS)
            self.database_id = self.database_id or kept
        return self.database_id

    async def flush(self) -> None:
        """Returns once every row that any process has committed so far is in its table, except
        drafts.

        Raises:
            DatabaseUnavailable: the rows cannot be moved now.
        """
        if await self._journal.last_movable() is None:
            return
        # A move that is already running may miss the newest rows.
        wanted = self._begun + 1
        self.soon()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._done >= wanted or self._failure or self._end.is_set()
            )
        if self._done < wanted:
            raise self._failure or DatabaseUnavailable("The database is closed.", retry_after=5)

    def soon(self) -> None:
        """Starts a move now."""
        self._asked.set()

    def soon_for_others(self) -> None:
        """Starts a move within half a second, because other machines see only moved rows."""
        if self._location.folder is not None:
            return
        loop = asyncio.get_running_loop()
        if self._gathering is None or self._gathering.when() <= loop.time():
            self._gathering = loop.call_later(_GATHER_SECONDS, self.soon)

    def soon_if_many(self) -> None:
        """Starts a move now if many rows wait."""
        if self._journal.rows_waiting >= _MOVE_ROWS:
            self._asked.set()

    async def close(self) -> None:
        """Moves the waiting rows within a time limit, then stops. Other rows stay in the
        journal."""
        if self._end.is_set() or not self._tasks:
            return
        self._end.set()
        self.soon()
        moving, _ = self._tasks
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if not await self._has_rows():
                    # The task may be waiting for a database that is unavailable.
                    moving.cancel()
                await asyncio.wait([moving])
                # A script may open the database, write one row and close it, so compact here too.
                await self.compactor.compact_if_due(self.tables)
        except TimeoutError:
            log.error("closing took longer than %g s: rows stay in the journal", _CLOSE_SECONDS)
        # A write in flight keeps its lock: it may still succeed.
        if self._in_flight is None or self._in_flight.done():
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        self.state = "closed"
        async with self._changed:
            self._changed.notify_all()
        if self.tables is not None:
            await self.tables.close()

    async def _has_rows(self) -> bool:
        try:
            # Without `create`, the journal is opened after the tables.
            return self._create and await self._journal.last_movable() is not None
        except DatabaseUnavailable:
            return False

    async def _keep_moving(self) -> None:
        delay = _BACKOFF_FIRST
        while True:
            is_last = self._end.is_set()
            try:
                if self.tables is None:
                    await self._open()
                await self._old_logs.read()
                await self._move()
            except Exception as error:  # noqa: BLE001 lancedb raises many types
                await self._set_away(error)
                if self._end.is_set():
                    return
                if isinstance(error, JournalUnavailable):
                    # The journal tries again by itself.
                    delay = _BACKOFF_FIRST
                await _wait(delay, self._end)
                delay = min(_BACKOFF_MOST, 2 * delay)
            else:
                if is_last:
                    return
                delay = _BACKOFF_FIRST
                await self.compactor.tidy()
                await _wait(self._every, self._asked)
                self._asked.clear()

    async def _open(self) -> None:
        async with asyncio.timeout(_OPEN_SECONDS), self.opening():
            tables = await open_tables(self._location, create=self._create)
        try:
            if not self._create:
                # There is a database, so it may have a journal.
                self._journal.start()
                self._create = True
            await self._journal.opened()
            await self._old_logs.read(wait=True)
        except BaseException:
            await tables.close()
            raise
        self.repairs += tables.repairs
        await self.compactor.count(tables)
        self.tables = tables
        self.database_id = tables.database_id
        if tables.database_id is not None:
            # The tables can be read even if the journal cannot be written.
            with contextlib.suppress(DatabaseUnavailable):
                await self._journal.keep_database_id(tables.database_id)
        await self._set_open()

    async def _set_open(self) -> None:
        self.state, self.reason, self._failure = "open", None, None
        async with self._changed:
            self._changed.notify_all()

    async def _set_away(self, error: Exception) -> None:
        """Records why the rows cannot be moved. Opening the tables again may repair them."""
        if isinstance(error, DatabaseUnavailable):
            self._failure = error
        else:
            self._failure = DatabaseUnavailable(
                f"The database at {self._location.shown} cannot be opened: {one_line(error)}; "
                "check LANCEDB_URI.",
                retry_after=5,
            )
        if self.tables is None or not isinstance(error, JournalUnavailable):
            if self._failure.detail != self.reason:
                log.error("%s", self._failure.detail)
            self.state, self.reason = "away", self._failure.detail
            tables, self.tables = self.tables, None
            if tables is not None:
                await tables.close()
        async with self._changed:
            self._changed.notify_all()

    async def _move(self) -> None:
        """Moves all rows that are committed so far, except drafts."""
        self._begun += 1
        this = self._begun
        until = await self._journal.last_movable() if self._journal.rows_waiting else None
        if until is not None:
            # The process that holds the lock may have started before the newest rows were
            # committed.
            async with held(self._location.log_folder / MOVING):
                await self._drop_finished_drafts()
                await self._move_until(until)
        self._done = this
        await self._set_open()

    async def _drop_finished_drafts(self) -> None:
        """Drops drafts whose runs another machine has finished, after this one had died."""
        if self._location.folder is None and (drafts := await self._journal.expired_drafts()):
            assert self.tables is not None
            await self._journal.drop_drafts(await self.tables.finished(drafts))

    async def _move_until(self, until: int) -> None:
        assert self.tables is not None
        while (taken := await self._journal.take(until, _MOVE_ROWS)) is not None:
            journal_id, batch = taken
            found = await asyncio.to_thread(decoded, batch.entries, self.database_id)
            for (table, again), data in found.tables.items():
                # Several sidecars receive the same feedback, a client may repeat a withdrawal, and
                # lancedb repeats a commit if the response of an object store is lost.
                merges = again or table in (FEEDBACK, WITHDRAWALS) or self._location.folder is None
                await self._awaited((self.tables.merge if merges else self.tables.add)(table, data))
            if found.unreadable:
                kept = await asyncio.to_thread(keep, found.unreadable, self._location.set_aside)
                self.note(
                    f"{len(found.unreadable)} rows are damaged or of another version of the "
                    f"sidecar; they are kept as {kept.name}"
                )
            await self.tables.sync({table for table, _ in found.tables})
            await self._journal.delete(journal_id, batch)
            if any(table in (FEEDBACK, WITHDRAWALS) for table, _ in found.tables):
                self.on_feedback()
            await self.compactor.rows_added(self.tables)

    async def _awaited(self, writing: Coroutine[Any, Any, None]) -> None:
        """Waits for a write without a deadline: an abandoned write may still succeed, and a retry
        would then store its rows twice."""
        self._in_flight = asyncio.ensure_future(writing)
        done, _ = await asyncio.wait([self._in_flight], timeout=_STALLED_SECONDS)
        if not done:
            self.state, self.reason = "away", f"A write takes longer than {_STALLED_SECONDS:g} s."
            log.error("%s", self.reason)
            await asyncio.wait([self._in_flight])
        self._in_flight.result()
        self.state, self.reason = "open", None


async def _wait(seconds: float, unless: asyncio.Event) -> None:
    """Waits for `seconds`, or until the event is set."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(unless.wait(), seconds)
