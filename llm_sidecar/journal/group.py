"""Group commit: the work of many callers in one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]
"""Runs inside a transaction; runs again if the transaction is repeated."""
_OF_ONE_UNIT: Final = (
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
    sqlite3.InterfaceError,
    sqlite3.DataError,
)
"""Errors of a single statement; other errors of SQLite concern the whole file."""


class Snapshot(NamedTuple):
    """The content of the journal. Times are on its clock; a draft does not count as the oldest
    row."""

    rows: int = 0
    row_bytes: int = 0
    oldest_row: float | None = None
    events: int = 0
    event_bytes: int = 0
    oldest_event: float | None = None
    newest_event: int = 0
    requests: int = 0
    request_bytes: int = 0


class Unit(Generic[T]):
    """Work that is done completely or not at all, and the future of its caller."""

    def __init__(self, work: Work[T], size: int, done: asyncio.Future[T]) -> None:
        self.work = work
        self.size = size
        self.done = done
        self.result: T | None = None
        self.error: Exception | None = None

    def resolve(self) -> None:
        """Wakes the caller, unless its deadline has passed."""
        if self.done.done():
            return
        if self.error is None:
            self.done.set_result(self.result)  # type: ignore[arg-type]
        else:
            self.done.set_exception(self.error)
            # Marks the exception as retrieved: the caller may be gone.
            self.done.exception()


class _UnitFailed(Exception):
    """A unit failed, so the group runs again with a savepoint for each unit."""


def commit(
    db: sqlite3.Connection, group: Sequence[Unit[Any]], chores: Sequence[Work[None]]
) -> Snapshot:
    """Commits a group. If a unit fails, only this unit is undone, and its caller gets the error."""
    try:
        return _pass(db, group, chores, _do)
    except _UnitFailed:
        return _pass(db, group, chores, _do_alone)


def _pass(
    db: sqlite3.Connection,
    group: Sequence[Unit[Any]],
    chores: Sequence[Work[None]],
    do: Callable[[sqlite3.Connection, Unit[Any]], None],
) -> Snapshot:
    db.execute("BEGIN IMMEDIATE")
    try:
        for chore in chores:
            chore(db)
        for unit in group:
            do(db, unit)
        snapshot = _snapshot(db)
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    return snapshot


def _do(db: sqlite3.Connection, unit: Unit[Any]) -> None:
    unit.error = None
    try:
        unit.result = unit.work(db)
    except Exception as error:
        if _is_of_file(error):
            raise
        raise _UnitFailed from error


def _do_alone(db: sqlite3.Connection, unit: Unit[Any]) -> None:
    unit.error = None
    db.execute("SAVEPOINT unit")
    try:
        unit.result = unit.work(db)
    except Exception as error:
        if _is_of_file(error):
            raise
        unit.error = error
        db.execute("ROLLBACK TO unit")
    db.execute("RELEASE unit")


def _is_of_file(error: Exception) -> bool:
    """Whether an error of SQLite concerns the whole file."""
    return isinstance(error, sqlite3.Error) and not isinstance(error, _OF_ONE_UNIT)


def _snapshot(db: sqlite3.Connection) -> Snapshot:
    (of_events, of_requests, of_rows) = db.execute(
        "SELECT number, bytes FROM totals ORDER BY name"
    ).fetchall()
    (oldest_row, oldest_event, newest_event) = db.execute(
        "SELECT (SELECT time FROM rows WHERE draft IS NULL ORDER BY id LIMIT 1), "
        "(SELECT time FROM events ORDER BY id LIMIT 1), coalesce((SELECT max(id) FROM events), 0)"
    ).fetchone()
    return Snapshot._make(
        [*of_rows, oldest_row, *of_events, oldest_event, newest_event, *of_requests]
    )
