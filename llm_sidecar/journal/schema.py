"""The tables of the journal, and connections to its file."""

from __future__ import annotations

import sqlite3
import time
import uuid
from pathlib import Path
from typing import Final

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal import events, requests, rows, totals

_VERSION: Final = 1
_BUSY_SECONDS: Final = 4.0
"""How long a transaction waits for those of other processes; less than the deadline of a commit."""
COLUMNS: Final = {
    "rows": ("target", "key", "data", "time", "again", "draft"),
    "events": ("key", "data", "time"),
    "requests": ("caller", "key", "fingerprint", "owner", "state", "response", "time"),
}
"""The columns of each table but its id."""


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file, which is created if it is missing.

    Raises:
        sqlite3.Error
    """
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # A commit returns once it is synced.
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {16 << 20}")
    except BaseException:
        db.close()
        raise
    return db


def create(db: sqlite3.Connection) -> str:
    """Creates the tables that are missing; returns the id of the journal.

    Args:
        db: inside a transaction.

    Raises:
        DatabaseUnavailable: a newer version of the sidecar has written it.
    """
    if not db.execute("SELECT name FROM sqlite_master WHERE name = 'meta'").fetchone():
        _create(db)
    meta = dict(db.execute("SELECT name, value FROM meta"))
    if meta["version"] > _VERSION:
        raise DatabaseUnavailable(
            f"The journal is of version {meta['version']}, and this sidecar knows {_VERSION}; "
            "update the sidecar.",
            retry_after=30,
        )
    return str(meta["id"])


def _create(db: sqlite3.Connection) -> None:
    for schema in (rows.SCHEMA, events.SCHEMA, requests.SCHEMA):
        # Not `executescript`, which commits the transaction.
        for statement in schema.split(";"):
            db.execute(statement)
    totals.create(db)
    db.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value)")
    meta = {"version": _VERSION, "id": uuid.uuid4().hex, "tried": 0}
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    # A relay may still remove events by the numbers of an earlier file, so these start higher.
    db.execute("INSERT INTO sqlite_sequence VALUES ('events', ?)", [int(time.time() * 1000)])
