"""Rows that wait for their tables.

Every function gets a connection inside a transaction of the journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final, NamedTuple

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal import totals

MOST_ROWS: Final = 200_000
MOST_BYTES: Final = 64 << 20
"""The journal refuses rows beyond either."""
DRAFT_SECONDS: Final = 600.0
_BATCH_BYTES: Final = 16 << 20

SCHEMA: Final = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    target TEXT NOT NULL,
    key TEXT NOT NULL,
    data BLOB NOT NULL,
    time REAL NOT NULL,
    again INTEGER NOT NULL,
    draft TEXT,
    UNIQUE (target, key)
);
CREATE INDEX rows_by_draft ON rows (draft) WHERE draft IS NOT NULL;
"""


class Entry(NamedTuple):
    """A row for a table.

    Attributes:
        data: its columns, as JSON.
        again: whether the table may have the row already.
    """

    target: str
    key: str
    data: bytes
    again: bool = False


class Batch(NamedTuple):
    """Rows to move now.

    Attributes:
        last: the id of the last one.
        entries: in the order of arrival.
    """

    first: int
    last: int
    entries: list[Entry]


def add(
    db: sqlite3.Connection, entries: Sequence[Entry], now: float, draft: str | None = None
) -> None:
    """Adds rows; the first of equal keys stays.

    Raises:
        DatabaseUnavailable: the journal is full.
    """
    if not entries:
        return
    number, size = totals.total(db, "rows")
    added = sum(len(one.data) for one in entries)
    if number + len(entries) > MOST_ROWS or size + added > MOST_BYTES:
        raise DatabaseUnavailable(FULL, retry_after=30)
    insert(db, entries, now, draft)


FULL: Final = "The journal is full until LanceDB takes its rows; check LANCEDB_URI."


def insert(
    db: sqlite3.Connection, entries: Sequence[Entry], now: float, draft: str | None = None
) -> None:
    """Adds rows, also to a full journal."""
    db.executemany(
        "INSERT OR IGNORE INTO rows (target, key, data, time, again, draft) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [(one.target, one.key, one.data, now, one.again, draft) for one in entries],
    )


def delete_draft(db: sqlite3.Connection, draft: str) -> int:
    """Deletes the rows of a draft; returns their number."""
    return db.execute("DELETE FROM rows WHERE draft = ?", [draft]).rowcount


def expired_drafts(db: sqlite3.Connection, now: float) -> list[str]:
    """The ids of the drafts that are no longer held."""
    found = db.execute(
        "SELECT DISTINCT draft FROM rows WHERE draft IS NOT NULL AND time <= ?",
        [now - DRAFT_SECONDS],
    )
    return [draft for (draft,) in found]


def last_movable(db: sqlite3.Connection, now: float) -> int | None:
    """The id of the newest row that is not held as a draft."""
    found = db.execute(
        "SELECT id FROM rows WHERE draft IS NULL OR time <= ? ORDER BY id DESC LIMIT 1",
        [now - DRAFT_SECONDS],
    ).fetchone()
    return None if found is None else int(found[0])


def take(db: sqlite3.Connection, now: float, until: int, most: int) -> Batch | None:
    """Takes the oldest rows up to an id, at most `most`; None if there are none.

    Marks them: from now on their tables may contain them, and they are no longer drafts.
    """
    (tried,) = db.execute("SELECT value FROM meta WHERE name = 'tried'").fetchone()
    found = db.execute(
        "SELECT id, target, key, data, again FROM rows "
        "WHERE id <= ? AND (draft IS NULL OR time <= ?) ORDER BY id LIMIT ?",
        [until, now - DRAFT_SECONDS, most],
    )
    ids, entries, size = [], [], 0
    for number, target, key, data, again in found:
        ids.append(number)
        entries.append(Entry(target, key, data, bool(again) or number <= tried))
        size += len(data)
        if size >= _BATCH_BYTES:
            break
    if not ids:
        return None
    db.execute(
        "UPDATE rows SET draft = NULL WHERE draft IS NOT NULL AND id BETWEEN ? AND ? AND time <= ?",
        [ids[0], ids[-1], now - DRAFT_SECONDS],
    )
    db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'tried'", [ids[-1]])
    return Batch(ids[0], ids[-1], entries)


def delete(db: sqlite3.Connection, batch: Batch) -> None:
    """Deletes the rows of a batch: all in its range of ids, except drafts, which were not in it."""
    db.execute(
        "DELETE FROM rows WHERE id BETWEEN ? AND ? AND draft IS NULL", [batch.first, batch.last]
    )


def find(db: sqlite3.Connection, target: str, keys: Sequence[str]) -> bytes | None:
    """The columns of the row that has one of the keys; None without one."""
    marks = ", ".join("?" * len(keys))
    found = db.execute(
        f"SELECT data FROM rows WHERE target = ? AND key IN ({marks})",
        [target, *keys],
    ).fetchone()
    return None if found is None else found[0]


def find_by_column(
    db: sqlite3.Connection, target: str, prefix: str, name: str, value: str
) -> bytes | None:
    """The columns of a row whose key begins with `prefix` and whose column `name` has this value;
    None without one."""
    after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    # A damaged row must not fail the whole transaction.
    found = db.execute(
        "SELECT data FROM rows WHERE target = ? AND key >= ? AND key < ? AND "
        "CASE WHEN json_valid(CAST(data AS TEXT)) "
        "THEN json_extract(CAST(data AS TEXT), ?) = ? END LIMIT 1",
        [target, prefix, after, f"$.{name}", value],
    ).fetchone()
    return None if found is None else found[0]
