"""Events that wait for Redis.

Every function gets a connection inside a transaction of the journal.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.journal import totals

if TYPE_CHECKING:
    from llm_sidecar.event_bus.outbox import Queued

MOST_EVENTS: Final = 200_000
MOST_BYTES: Final = 64 << 20
MOST_SECONDS: Final = 7 * 86400.0
"""Beyond any of them the oldest events are dropped, because rows matter more."""

SCHEMA: Final = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    data BLOB NOT NULL,
    time REAL NOT NULL
);
"""


def add(db: sqlite3.Connection, events: Sequence[CloudEvent], now: float) -> int:
    """Adds events; returns how many old ones were dropped for them."""
    if not events:
        return 0
    db.executemany(
        "INSERT OR IGNORE INTO events (key, data, time) VALUES (?, ?, ?)",
        [(event.id, json.dumps(asdict(event)).encode(), now) for event in events],
    )
    return totals.drop_oldest(db, "events", MOST_EVENTS, MOST_BYTES)


def expire(db: sqlite3.Connection, now: float) -> int:
    """Drops events that are too old; returns how many. See `totals.drop_older`."""
    return totals.drop_older(db, "events", now - MOST_SECONDS)


def head(db: sqlite3.Connection, count: int) -> list[Queued]:
    """The oldest events, at most `count`."""
    # Imported here, because the package imports redis, which a command line does not need.
    from llm_sidecar.event_bus.outbox import Queued

    found = db.execute("SELECT id, data FROM events ORDER BY id LIMIT ?", [count])
    return [Queued(number, CloudEvent(**json.loads(data))) for number, data in found]


def delete(db: sqlite3.Connection, number: int) -> None:
    """Deletes the events up to and including `number`."""
    db.execute("DELETE FROM events WHERE id <= ?", [number])
