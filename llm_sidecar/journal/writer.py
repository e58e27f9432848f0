"""The thread that owns the journal's file: it commits the waiting work in groups."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from llm_sidecar.errors import DatabaseUnavailable, one_line
from llm_sidecar.journal import events, requests
from llm_sidecar.journal.file import JournalFile, is_damage
from llm_sidecar.journal.group import Snapshot, Unit, Work, commit

T = TypeVar("T")
log = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 5.0
"""The deadline of a commit."""
_SLOW: Final = f"the disk takes longer than {_COMMIT_SECONDS:g} s"
_TAKEN: Final = f"another process has kept the journal for longer than {_COMMIT_SECONDS:g} s."
_MOST_BYTES: Final = 64 << 20
"""The maximum size of the work that waits for a commit."""
_MOST_UNITS: Final = 2000
"""The maximum number of units in a group, because other processes wait for its end."""
TICK_SECONDS: Final = 1.0
"""Seconds between two checks of the file and its disk while nothing is committed."""
_MAINTAIN_TICKS: Final = 60
_REPORT_SECONDS: Final = 60.0
_ATTEMPTS: Final = 3
_PROBE_BYTES: Final = 1 << 14
"""The size of a probe write: larger than most rows."""
_LOW_BYTES: Final = 1 << 20
"""With less free space than this, each tick writes a probe, because not all free space is
usable."""


class JournalUnavailable(DatabaseUnavailable):
    """The journal cannot be opened or written."""


class JournalWriter:
    """Runs work in transactions of the journal.

    Attributes:
        file: used by the thread, and by work that runs in it.
        snapshot: the content of the journal, of all processes; at most a second old.
        events_dropped, requests_dropped: by this process, because the journal was full or they were
            too old.
        on_change: called in the event loop after the snapshot has changed.
    """

    def __init__(self, file: JournalFile) -> None:
        """Starts no thread yet."""
        self.file = file
        self.snapshot = Snapshot()
        self.events_dropped = self.requests_dropped = 0
        self.on_change: Callable[[], None] = lambda: None
        self.is_open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gathered: list[Unit[Any]] = []
        self._waiting: list[Unit[Any]] = []
        self._waiting_bytes = 0
        self._failure: str | None = None
        self._began: float | None = None
        self._arrived = threading.Condition()
        self._end = False
        self._ended = asyncio.Event()
        self._ticks = 0
        self._next_tick = 0.0
        self._reported = (0, 0)
        self._next_report = 0.0

    @property
    def failure(self) -> str | None:
        """Why nothing can be committed now; None if it can."""
        began = self._began
        if began is not None and time.monotonic() - began > _COMMIT_SECONDS:
            return f"The database accepts no rows: {self._delay()}"
        return self._failure

    def _delay(self) -> str:
        return _TAKEN if self.file.waits else self._advice(_SLOW)

    def _advice(self, reason: str) -> str:
        return f"{reason}; free space at {self.file.folder} or check LANCEDB_URI."

    def start(self) -> None:
        """Starts the thread, which opens the file."""
        self._loop = asyncio.get_running_loop()
        # A daemon, because a disk that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="journal", daemon=True).start()

    async def close(self) -> None:
        """Commits the waiting work, then closes the file.

        Raises:
            TimeoutError: the disk took too long.
        """
        self._end = True
        self._hand_over()
        if self._loop is not None:
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self._ended.wait()

    async def run(self, work: Work[T], size: int = 0) -> T:
        """Runs work in a transaction, and returns its result once it would survive a power loss.

        Args:
            work: runs in the thread of the journal; runs again if the file has to be opened again.
            size: the bytes that it holds in memory.

        Raises:
            JournalUnavailable: it is not committed; after the deadline, the outcome is unknown.
            Exception: whatever the work raises; then it is not committed.
        """
        if self._end:
            raise JournalUnavailable("The database is closed.", retry_after=5)
        if self._waiting_bytes + size > _MOST_BYTES:
            raise JournalUnavailable(
                "The journal is busy: too many transactions wait.", retry_after=5
            )
        loop = asyncio.get_running_loop()
        unit = Unit(work, size, loop.create_future())
        if not self._gathered:
            # Callers that the last group woke arrive together; this commits them as one group.
            loop.call_soon(self._hand_over)
        self._gathered.append(unit)
        self._waiting_bytes += size
        deadline = loop.call_later(_COMMIT_SECONDS, self._expire, unit)
        try:
            result: T = await unit.done
            return result
        finally:
            deadline.cancel()

    def _expire(self, unit: Unit[Any]) -> None:
        known = "not stored" if self._withdraw(unit) else "not known to be stored"
        detail = f"The transaction is {known}: {self._delay()}"
        if not unit.done.done():
            unit.done.set_exception(JournalUnavailable(detail, retry_after=5))

    def _hand_over(self) -> None:
        with self._arrived:
            self._waiting += self._gathered
            self._arrived.notify()
        self._gathered = []

    def _withdraw(self, unit: Unit[Any]) -> bool:
        """Removes work that has not begun."""
        with self._arrived:
            waits = unit in self._waiting
            if waits:
                self._waiting.remove(unit)
                self._waiting_bytes -= unit.size
        return waits

    def _resolve(self, group: Sequence[Unit[Any]]) -> None:
        self.on_change()
        for unit in group:
            self._waiting_bytes -= unit.size
            unit.resolve()

    # In the thread

    def _run(self) -> None:
        while True:
            with self._arrived:
                if not self._waiting and not self._end:
                    self._arrived.wait(TICK_SECONDS)
                group = self._waiting[:_MOST_UNITS]
                del self._waiting[:_MOST_UNITS]
                is_last = self._end and not group
            if is_last:
                break
            self._began = time.monotonic()
            if self._began >= self._next_tick:
                self._next_tick = self._began + TICK_SECONDS
                self._commit([], self._chores())
            if group:
                self._commit(group)
            self._began = None
            self._tell(partial(self._resolve, group))
        try:
            self.file.close()
        except (sqlite3.Error, OSError, DatabaseUnavailable) as error:
            log.error("the journal could not be closed: %s", one_line(error))
        self._tell(self._ended.set)

    def _tell(self, work: Callable[[], object]) -> None:
        assert self._loop is not None
        # The loop may have ended while the disk was hanging.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def _chores(self) -> list[Work[None]]:
        """Runs the checks that are due every second."""
        chores: list[Work[None]] = []
        self._report_dropped()
        self._ticks += 1
        if self._ticks % _MAINTAIN_TICKS == 0 and self.is_open:
            chores.append(self._maintain)
        if self._failure is not None or (self.is_open and self.file.is_almost_full(_LOW_BYTES)):
            chores.append(_probe)
        return chores

    def _maintain(self, db: sqlite3.Connection) -> None:
        clock = self.file.clock
        clock.save(db)
        self.count_dropped(events=events.expire(db, clock.now()))
        requests.expire(db, clock.now())

    def count_dropped(self, events: int = 0, requests: int = 0) -> None:
        """Counts dropped events and requests."""
        self.events_dropped += events
        self.requests_dropped += requests
        self._report_dropped()

    def _report_dropped(self) -> None:
        """Logs what was dropped, at most once a minute: every commit to a full journal drops."""
        dropped = self.events_dropped, self.requests_dropped
        now = time.monotonic()
        if dropped != self._reported and now >= self._next_report:
            events, requests = (a - b for a, b in zip(dropped, self._reported, strict=True))
            log.error("the journal dropped %d events and %d requests", events, requests)
            self._reported, self._next_report = dropped, now + _REPORT_SECONDS

    def _commit(self, group: Sequence[Unit[Any]], chores: Sequence[Work[None]] = ()) -> None:
        try:
            for _ in range(_ATTEMPTS):
                if self._attempt(group, chores):
                    break
                self.file.reopen()
            else:
                raise OSError("its files are removed repeatedly")
        except Exception as error:  # noqa: BLE001 every caller gets it, and the thread goes on
            self._fail(group, error)

    def _attempt(self, group: Sequence[Unit[Any]], chores: Sequence[Work[None]]) -> bool:
        """Commits. Returns False if the files must be opened again; then nothing is
        acknowledged."""
        with self.file.turn() as db:
            if not self.file.is_current():
                return False
            try:
                before = db.total_changes
                snapshot = commit(db, group, chores)
                has_written = db.total_changes > before
            except sqlite3.Error as error:
                if is_damage(error):
                    return False
                raise
        if not self.file.is_current():
            return False
        self.snapshot = snapshot
        if has_written or not self.is_open:
            self._failure = None
        self.is_open = True
        return True

    def _fail(self, group: Sequence[Unit[Any]], error: Exception) -> None:
        reason = getattr(error, "strerror", None) or _reason(error)
        if self._failure is None:
            log.error("the journal commits nothing: %s", reason)
        self._failure = f"The database accepts no rows: {self._advice(reason)}"
        failure = JournalUnavailable(
            f"The journal cannot be written: {self._advice(reason)}", retry_after=5
        )
        for unit in group:
            unit.error = failure
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
            # After a failed sync the state of a file is unknown, so it is opened and checked again.
            with contextlib.suppress(sqlite3.Error, OSError, DatabaseUnavailable):
                self.file.close()


def _probe(db: sqlite3.Connection) -> None:
    """Writes about as much as a row."""
    db.execute(f"INSERT OR REPLACE INTO meta VALUES ('probe', randomblob({_PROBE_BYTES}))")


def _reason(error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return os.strerror(errno.ENOSPC)
    return one_line(error)
