"""Group-commits rows to the write-ahead log, then moves them to LanceDB in batches."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from llm_sidecar.db import log as wal
from llm_sidecar.db.compaction import Compactor
from llm_sidecar.db.lance import one_line
from llm_sidecar.db.location import Location
from llm_sidecar.db.log import Row
from llm_sidecar.db.replay import replay
from llm_sidecar.db.rows import FEEDBACK, TABLES, WITHDRAWALS
from llm_sidecar.db.tables import Tables, open_tables
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.logs import start_detached

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOG_SECONDS: Final = 5.0
"""The deadline of an acknowledgement."""
_STALLED_SECONDS: Final = 10.0
"""After this time a write counts as stalled. The writer still waits for it."""
_MOVE_EVERY: Final = 1.0
"""Seconds between two batches, because every batch adds files. A query or many waiting rows start
one at once."""
_MOVE_EVERY_REMOTE: Final = 5.0
_CLOSING_PAUSE: Final = 0.01
_MOVE_ROWS: Final = 10_000
_LOG_BYTES: Final = 64 << 20
"""The maximum size of the log while LanceDB is unavailable."""
_KEEP_SECONDS: Final = 300.0
_KEEP_BYTES: Final = 64 << 20
"""The maximum age in seconds and size in bytes of the log that is kept after its rows are synced in
their tables: a second copy, in case the newest table files are unreadable anyway."""
_BACKOFF_FIRST: Final = 0.5
_BACKOFF_MOST: Final = 30.0
_OPEN_SECONDS: Final = 60.0
_SWEEP_SECONDS: Final = 30.0
"""Seconds between two searches for logs of dead processes."""
_IDLE_SECONDS: Final = 600.0
"""Seconds after the last row until unused versions are deleted."""
_CLOSE_SECONDS: Final = 10.0
_CHECK_SECONDS: Final = 2.0
"""Seconds between two checks that the log can accept a row."""


class _Waiting(NamedTuple):
    row: Row
    record: bytes
    stored: asyncio.Future[None]


class _Kept(NamedTuple):
    path: Path
    moved: float
    size: int


class Writer:
    """The only writer of this process for a database.

    Attributes:
        tables: None until the database is open.
        state: `opening`, `open`, `away` (LanceDB is unavailable; the log still accepts rows) or
            `closed`.
        reason: why the state is `away`; None otherwise.
        rows_written: the number of acknowledged rows.
        compactor: compacts the tables.
        repairs: what was repaired or replayed, in words.
        log_failure: why the last rows could not be stored; None if they could.
        database_id: the database's own id; None until it has been opened.
    """

    def __init__(self, location: Location, *, create: bool = True) -> None:
        """Does no I/O yet; see `start`."""
        self.tables: Tables | None = None
        self.state = "opening"
        self.reason: str | None = None
        self.rows_written = 0
        self.compactor = Compactor()
        self.repairs: list[str] = []
        self.log_failure: str | None = None
        self.database_id: str | None = None
        self.failure: DatabaseUnavailable | None = None
        self._location = location
        self._create = create
        self._every = _MOVE_EVERY if location.folder is not None else _MOVE_EVERY_REMOTE
        self._log: wal.Log | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-ahead-log")
        self._log_lock = asyncio.Lock()
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._logged: list[Row] = []
        self._logged_bytes = 0
        self._moving: list[Row] = []
        self._moving_bytes = 0
        self._segments: list[Path] = []
        self._kept: collections.deque[_Kept] = collections.deque()
        self._certain = True
        self._moved = 0
        self._asked = asyncio.Event()
        self._changed = asyncio.Condition()
        self._end = asyncio.Event()
        self._swept = self._last_move = time.monotonic()
        self._tidied = True
        self._in_flight: asyncio.Future[Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts to accept rows and to open the database."""
        self._tasks = [
            start_detached(self._keep_logging()),
            start_detached(self._keep_moving()),
            start_detached(self._keep_compacting()),
            start_detached(self._keep_checking()),
        ]

    async def opened(self, seconds: float) -> Tables:
        """Waits for the tables.

        Raises:
            DatabaseUnavailable: they are not open within `seconds`, or the last attempt failed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.tables or self.failure)
        if self.tables is None:
            raise self.failure or DatabaseUnavailable(
                f"The database at {self._location.shown} cannot be opened: it took longer than "
                f"{seconds:g} s; check LANCEDB_URI.",
                retry_after=5,
            )
        return self.tables

    def refusal(self) -> str | None:
        """Why the log accepts no rows now; None if it does."""
        if self._end.is_set():
            return "The database is closed."
        if self.log_failure is not None:
            return self.log_failure
        if self._log is None:
            return self.reason or "The database is being opened."
        if self._pending_bytes() >= _LOG_BYTES:
            return self._full()
        return None

    def _full(self) -> str:
        return (
            f"The write-ahead log is full until the database is back: {self.reason or 'it is busy'}"
        )

    def log_status(self) -> dict[str, Any]:
        """The state of the log, as JSON types."""
        return {
            "accepts_rows": self.refusal() is None,
            "bytes": self._pending_bytes(),
            "most_bytes": _LOG_BYTES,
        }

    async def append(self, row: Row) -> None:
        """Returns once the row would survive a power loss.

        Raises:
            DatabaseUnavailable: it is not stored or, after the deadline, may not be stored. A retry
                is safe for a row that has its own key.
        """
        if self._end.is_set():
            raise DatabaseUnavailable("The database is closed.", retry_after=5)
        if self._pending_bytes() >= _LOG_BYTES:
            raise DatabaseUnavailable(self._full(), retry_after=30)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(row, wal.encode(row), stored)
        self._waiting.append(waiting)
        self._waiting_bytes += len(waiting.record)
        self._arrived.set()
        try:
            async with asyncio.timeout(_LOG_SECONDS):
                await asyncio.shield(stored)
        except TimeoutError:
            begun = not any(other is waiting for other in self._waiting)
            if not begun:
                self._waiting = [other for other in self._waiting if other is not waiting]
                self._waiting_bytes -= len(waiting.record)
            known = "not known to be stored" if begun else "not stored"
            raise DatabaseUnavailable(
                f"The row is {known}: the disk took longer than {_LOG_SECONDS:g} s.", retry_after=5
            ) from None

    async def flush(self) -> None:
        """Returns once every row acknowledged so far is in its table, or a move has failed."""
        target = self.rows_written
        if self._moved >= target:
            return
        self._asked.set()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._moved >= target or self.failure or self._end.is_set()
            )

    def rows_waiting(self) -> int:
        """Rows that are in the log and not yet in their tables."""
        return self.rows_written - self._moved

    def pending(self) -> list[Row]:
        """The acknowledged rows that may not be in their tables yet."""
        return [*self._moving, *self._logged]

    async def close(self) -> None:
        """Moves the logged rows, within a time limit, then closes. The rest is replayed later."""
        if self._end.is_set() or not self._tasks:
            return
        self._end.set()
        for event in (self._arrived, self._asked):
            event.set()
        logging_rows, moving, *_ = self._tasks
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.wait([logging_rows])
                if not self.rows_waiting():
                    # The task may be waiting for a database that is unavailable.
                    moving.cancel()
                await asyncio.wait([moving])
                # A script may open, write one row and close, so compaction is due here too.
                await self.compactor.compact_if_due(self.tables)
        except TimeoutError:
            log.warning("closing took longer than %g s", _CLOSE_SECONDS)
        if self.rows_waiting():
            log.error("%d rows stay in the log until the next start", self.rows_waiting())
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.state = "closed"
        async with self._changed:
            self._changed.notify_all()
        try:
            # A running write may still succeed, so a replay of the log could store its rows twice.
            # The log stays locked until this process ends.
            if self._in_flight is None or self._in_flight.done():
                async with asyncio.timeout(_LOG_SECONDS):
                    await self._on_disk(self._close_log)
        except (OSError, TimeoutError) as error:
            log.error("the log could not be closed: %s", one_line(error))
        finally:
            self._thread.shutdown(wait=False)
            if self.tables is not None:
                await self.tables.close()

    def _close_log(self) -> None:
        try:
            for kept in self._kept:
                kept.path.unlink(missing_ok=True)
        finally:
            if self._log is not None:
                self._log.close()

    def _pending_bytes(self) -> int:
        return self._waiting_bytes + self._logged_bytes + self._moving_bytes

    async def _on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    # Writing rows to the log

    async def _keep_logging(self) -> None:
        while self._waiting or not self._end.is_set():
            await self._arrived.wait()
            self._arrived.clear()
            group, self._waiting = self._waiting, []
            if group:
                await self._log_group(group)
                self._waiting_bytes -= sum(len(waiting.record) for waiting in group)
            if self._end.is_set():
                self._arrived.set()

    async def _log_group(self, group: Sequence[_Waiting]) -> None:
        async with self._log_lock:
            try:
                await self._on_disk(self._to_log, [waiting.record for waiting in group])
            except Exception as error:  # noqa: BLE001 every caller gets the error
                reason = getattr(error, "strerror", None) or one_line(error)
                failure = DatabaseUnavailable(
                    f"The row is not stored: {reason}; free space at "
                    f"{self._location.log_folder} or check LANCEDB_URI.",
                    retry_after=5,
                )
                log.error("%d rows are refused: %s", len(group), failure.detail)
                self.log_failure = failure.detail
                for waiting in group:
                    _fail(waiting.stored, failure)
                return
            self._logged += [waiting.row for waiting in group]
            self._logged_bytes += sum(len(waiting.record) for waiting in group)
            self.rows_written += len(group)
            self.log_failure = None
        for waiting in group:
            if not waiting.stored.done():
                waiting.stored.set_result(None)
        if len(self._logged) >= _MOVE_ROWS:
            self._asked.set()

    def _to_log(self, records: Sequence[bytes]) -> None:
        self._open_log().append(records)

    def _check_log(self) -> None:
        self._open_log().check(self.log_failure is not None)

    def _open_log(self) -> wal.Log:
        if self._log is not None and self._log.is_gone():
            # Rows that are not in their tables yet are still in memory.
            log.error("the folder of the write-ahead log is gone; a new one is made")
            self._log.close()
            self._log = None
        if self._log is None:
            self._log = wal.Log(self._location.log_folder)
        return self._log

    async def _keep_checking(self) -> None:
        """Keeps `log_failure` current while no rows arrive.

        A server that is not ready receives no rows, so it would not notice that the disk has space
        again.
        """
        while not self._end.is_set():
            await _wait(_CHECK_SECONDS, self._end)
            is_opening = self._log is None and self.log_failure is None
            if is_opening or self._waiting or self._end.is_set():
                continue
            try:
                async with asyncio.timeout(_LOG_SECONDS):
                    await self._on_disk(self._check_log)
            except TimeoutError:
                self._set_log_failure(f"the disk took longer than {_LOG_SECONDS:g} s")
            except OSError as error:
                self._set_log_failure(error.strerror or one_line(error))
            else:
                self.log_failure = None

    def _set_log_failure(self, reason: str) -> None:
        failure = (
            f"The database accepts no rows: {reason}; free space at {self._location.log_folder} or "
            "check LANCEDB_URI."
        )
        if self.log_failure is None:
            log.error("%s", failure)
        self.log_failure = failure

    # Moving rows from the log to the tables

    async def _keep_moving(self) -> None:
        delay = _BACKOFF_FIRST
        while not self._is_done():
            try:
                if self.tables is None:
                    await self._open()
                await self._sweep()
                await self._move()
                await self._delete_old_segments()
            except Exception as error:  # noqa: BLE001 lancedb raises many types
                await self._set_away(error)
                if self._end.is_set():
                    return
                await _wait(delay, self._end)
                delay = min(_BACKOFF_MOST, 2 * delay)
            else:
                delay = _BACKOFF_FIRST
                # While closing, rows may still arrive in the log.
                await _wait(_CLOSING_PAUSE if self._end.is_set() else self._every, self._asked)
                self._asked.clear()

    def _is_done(self) -> bool:
        return self._end.is_set() and self._tasks[0].done() and not self.rows_waiting()

    async def _open(self) -> None:
        if self._create:
            await self._on_disk(self._open_log)
        async with asyncio.timeout(_OPEN_SECONDS):
            tables = await open_tables(self._location, create=self._create)
        try:
            await self._replay(tables, wait=True)
        except BaseException:
            await tables.close()
            raise
        self.repairs += tables.repairs
        self._swept = time.monotonic()
        await self.compactor.count(tables)
        self.tables = tables
        self.database_id = tables.database_id
        await self._set_open()

    async def _set_open(self) -> None:
        self.state, self.reason, self.failure = "open", None, None
        async with self._changed:
            self._changed.notify_all()

    async def _set_away(self, error: Exception) -> None:
        """Records why the tables cannot be used. Opening them again may repair them."""
        detail = (
            error.detail
            if isinstance(error, DatabaseUnavailable)
            else f"The database at {self._location.shown} cannot be opened: {one_line(error)}; "
            "check LANCEDB_URI."
        )
        if detail != self.reason:
            log.error("%s", detail)
        self.state, self.reason = "away", detail
        self.failure = DatabaseUnavailable(detail, retry_after=5)
        tables, self.tables = self.tables, None
        if tables is not None:
            await tables.close()
        async with self._changed:
            self._changed.notify_all()

    async def _sweep(self) -> None:
        """Replays the logs of processes that have died since the last replay."""
        if self.tables is not None and time.monotonic() - self._swept > _SWEEP_SECONDS:
            await self._replay(self.tables, wait=False)
            self._swept = time.monotonic()

    async def _replay(self, tables: Tables, *, wait: bool) -> None:
        async def insert(rows: Sequence[Row]) -> None:
            await self._insert(tables, rows, certain=False)

        await replay(self._location, tables, insert, self._note, wait=wait)

    def _note(self, done: str) -> None:
        log.warning("%s", done)
        self.repairs.append(done)

    async def _move(self) -> None:
        """Moves the logged rows to the tables."""
        async with self._log_lock:
            if self._log is not None and self._logged:
                self._segments += await self._on_disk(self._log.seal)
            self._moving += self._logged
            self._moving_bytes += self._logged_bytes
            self._logged, self._logged_bytes = [], 0
        if not self._moving:
            return
        assert self.tables is not None
        # A failed attempt may have stored some rows.
        certain, self._certain = self._certain, False
        await self._insert(self.tables, self._moving, certain=certain)
        touched = {row.table for row in self._moving}
        await self.tables.sync(touched)
        now = time.monotonic()
        self._kept += [_Kept(path, now, _size(path)) for path in self._segments]
        self._moved += len(self._moving)
        self._moving, self._moving_bytes, self._segments = [], 0, []
        self._certain = True
        await self._set_open()
        await self.compactor.count(self.tables)
        self._last_move = now
        self._tidied = False
        self.compactor.request_if_many()

    async def _insert(self, tables: Tables, rows: Sequence[Row], *, certain: bool) -> None:
        """Stores rows in their tables.

        Args:
            certain: whether none of the rows can be in its table yet. Feedback and withdrawals
                always can: several sidecars receive the same feedback, and a client may repeat a
                withdrawal.
        """
        for name in TABLES:
            mine = [row for row in rows if row.table == name]
            for start in range(0, len(mine), _MOVE_ROWS):
                batch = mine[start : start + _MOVE_ROWS]
                # lancedb repeats a commit if the response of an object store is lost.
                new = certain and name not in (FEEDBACK, WITHDRAWALS)
                store = tables.add if new and self._location.folder is not None else tables.merge
                await self._awaited(store(name, batch))

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

    async def _delete_old_segments(self) -> None:
        """Deletes segments of the log that are no longer needed."""
        size = sum(kept.size for kept in self._kept)
        while self._kept and (
            size > _KEEP_BYTES or time.monotonic() - self._kept[0].moved > _KEEP_SECONDS
        ):
            oldest = self._kept.popleft()
            size -= oldest.size
            await self._on_disk(oldest.path.unlink, True)
        if not self._tidied and time.monotonic() - self._last_move > _IDLE_SECONDS:
            self._tidied = True
            self.compactor.due.set()

    async def compact(self) -> bool:
        """Compacts now; returns False if another process is compacting.

        Raises:
            DatabaseUnavailable: the database is not open.
            Exception: whatever lancedb raises.
        """
        return await self.compactor.compact(await self.opened(_LOG_SECONDS))

    async def _keep_compacting(self) -> None:
        while not self._end.is_set():
            await _wait(math.inf, self.compactor.due)
            pause = await self.compactor.compact_if_due(self.tables)
            await _wait(pause, self._end)


async def _wait(seconds: float, unless: asyncio.Event) -> None:
    """Waits for `seconds`, or until the event is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if seconds == math.inf else seconds):
            await unless.wait()


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Marks the exception as retrieved, because a caller whose deadline has passed does not
        # retrieve it.
        future.exception()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
