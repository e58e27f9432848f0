"""The number and bytes of what is in each table of the journal; triggers keep them.

Every function gets a connection inside a transaction of the journal.
"""

from __future__ import annotations

import sqlite3
from typing import Final

MOST_DROPPED: Final = 5_000
_SIZES: Final = {
    "rows": "length({0}.data)",
    "events": "length({0}.data)",
    "requests": "200 + length(coalesce({0}.state, '')) + length(coalesce({0}.response, x''))",
}
"""The bytes of an entry of each table, in SQL."""


def create(db: sqlite3.Connection) -> None:
    """Starts to count, once the tables exist."""
    db.execute("CREATE TABLE totals (name TEXT PRIMARY KEY, number INTEGER, bytes INTEGER)")
    db.executemany("INSERT INTO totals VALUES (?, 0, 0)", [[table] for table in _SIZES])
    for table in _SIZES:
        for change in ("INSERT", "DELETE"):
            db.execute(_counting(table, change))
    db.execute(_counting("requests", "UPDATE"))


def _counting(table: str, change: str) -> str:
    """A trigger that keeps the number and size of a table's entries."""
    number = {"INSERT": "+ 1", "DELETE": "- 1", "UPDATE": ""}[change]
    added = "" if change == "DELETE" else f"+ {_SIZES[table].format('new')}"
    removed = "" if change == "INSERT" else f"- ({_SIZES[table].format('old')})"
    return (
        f"CREATE TRIGGER {table}_{change.lower()} AFTER {change} ON {table} BEGIN "
        f"UPDATE totals SET number = number {number}, bytes = bytes {added} {removed} "
        f"WHERE name = '{table}'; END"
    )


def total(db: sqlite3.Connection, table: str) -> tuple[int, int]:
    """The number and bytes of a table's entries."""
    number, size = db.execute("SELECT number, bytes FROM totals WHERE name = ?", [table]).fetchone()
    return number, size


def drop_older(db: sqlite3.Connection, table: str, before: float) -> int:
    """Drops entries from before a time, oldest first; returns how many.

    At most `MOST_DROPPED`, because a long transaction would make others miss their deadline.
    """
    oldest = f"SELECT id FROM {table} ORDER BY id LIMIT {MOST_DROPPED}"
    return db.execute(f"DELETE FROM {table} WHERE id IN ({oldest}) AND time < ?", [before]).rowcount


def drop_oldest(
    db: sqlite3.Connection, table: str, most: int, most_bytes: int, which: str = "true"
) -> int:
    """Drops the oldest entries beyond a number and bytes; returns how many.

    Args:
        which: the entries that may be dropped, in SQL.
    """
    oldest = f"(SELECT min(id) FROM {table} WHERE {which})"
    dropped = 0
    while True:
        number, size = total(db, table)
        if number <= most and size <= most_bytes:
            return dropped
        if not db.execute(f"DELETE FROM {table} WHERE id = {oldest}").rowcount:
            return dropped
        dropped += 1
