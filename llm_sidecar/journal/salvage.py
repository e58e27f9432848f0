"""Copies the readable entries of a damaged or deleted journal to another journal."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from llm_sidecar.journal.schema import COLUMNS

_MOST_LOOKUPS: Final = 200_000

Content = dict[str, list[tuple[Any, ...]]]
"""The entries of each table, as in `COLUMNS`."""


def read(db: sqlite3.Connection) -> Content:
    """All entries that can be read, oldest first."""
    return {table: _entries(db, table) for table in COLUMNS}


def _entries(db: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    select = f"SELECT id, {', '.join(COLUMNS[table])} FROM {table}"
    found: dict[int, tuple[Any, ...]] = {}
    if not _scan(db, f"{select} ORDER BY id", found):
        # Reads from the other end back to the damage, then row by row in between.
        before = max(found, default=0)
        _scan(db, f"{select} ORDER BY id DESC", found)
        after = min((number for number in found if number > before), default=before)
        for number in range(before + 1, min(after, before + _MOST_LOOKUPS)):
            _scan(db, f"{select} WHERE id = {number}", found)
    return [found[number] for number in sorted(found)]


def _scan(db: sqlite3.Connection, select: str, found: dict[int, tuple[Any, ...]]) -> bool:
    """Adds entries to `found` until an error; returns whether there was none."""
    try:
        for number, *values in db.execute(select):
            found[number] = tuple(values)
    except sqlite3.Error:
        return False
    return True


def write(db: sqlite3.Connection, content: Content, now: float) -> None:
    """Adds entries that the journal does not have; their ages start again.

    A row may already be in its table: another process may have read and moved it too.
    """
    for table, entries in content.items():
        columns = COLUMNS[table]
        changed = {"time": now, "again": 1}
        values = [
            [changed.get(name, value) for name, value in zip(columns, entry, strict=True)]
            for entry in entries
        ]
        marks = ", ".join("?" * len(columns))
        db.executemany(
            f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({marks})",
            values,
        )


def clear(db: sqlite3.Connection) -> None:
    """Deletes all entries, so that no other process copies them again."""
    for table in COLUMNS:
        db.execute(f"DELETE FROM {table}")
