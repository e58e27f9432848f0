"""Requests with an `Idempotency-Key`.

Every function gets a connection inside a transaction of the journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llm_sidecar.errors import RequestKeyReused
from llm_sidecar.journal import totals

MOST_REQUESTS: Final = 100_000
MOST_BYTES: Final = 128 << 20
MOST_SECONDS: Final = 86400.0
"""Beyond any of them the oldest requests are dropped."""

SCHEMA: Final = """
CREATE TABLE requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    owner TEXT,
    state TEXT,
    response BLOB,
    time REAL NOT NULL,
    UNIQUE (caller, key)
);
"""
REUSED: Final = "This Idempotency-Key belongs to another request; use a new one for each request."


@dataclass(frozen=True, slots=True)
class RequestKey:
    """An `Idempotency-Key` of one caller.

    Attributes:
        caller: the name of the API key, or an empty string without one.
        key: the value of the header.
    """

    caller: str
    key: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a request with an `Idempotency-Key`.

    Attributes:
        request: its key. This process must have claimed it with `Store.claim`.
        state: JSON text, from which a retry continues; None to keep the stored one.
        response: the whole answer as bytes, once there is one.
    """

    request: RequestKey
    state: str | None = None
    response: bytes | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed request. The caller answers it, with the response if there is one.

    Attributes:
        state: the progress of an earlier attempt that died or failed; None for a new request.
        response: the whole answer of an earlier attempt; None if the caller has to make it.
    """

    state: str | None = None
    response: bytes | None = None


def claim(
    db: sqlite3.Connection,
    request: RequestKey,
    fingerprint: str,
    owner: str,
    is_alive: Callable[[str], bool],
    now: float,
) -> Claim | None:
    """Makes `owner` the owner of a request; None while another live process answers it.

    Raises:
        RequestKeyReused: the key belongs to a request with another fingerprint.
    """
    found = db.execute(
        "SELECT fingerprint, owner, state, response FROM requests WHERE caller = ? AND key = ?",
        [request.caller, request.key],
    ).fetchone()
    if found is None:
        db.execute(
            "INSERT INTO requests (caller, key, fingerprint, owner, time) VALUES (?, ?, ?, ?, ?)",
            [request.caller, request.key, fingerprint, owner, now],
        )
        return Claim()
    first, current, state, response = found
    if first != fingerprint:
        raise RequestKeyReused(REUSED)
    if response is not None:
        return Claim(state, response)
    if current not in (None, owner) and is_alive(current):
        return None
    db.execute(
        "UPDATE requests SET owner = ? WHERE caller = ? AND key = ?",
        [owner, request.caller, request.key],
    )
    return Claim(state)


def save(
    db: sqlite3.Connection, progress: Progress, fingerprint: str, owner: str, now: float
) -> int:
    """Stores progress; returns how many old requests were dropped for it."""
    db.execute(
        "INSERT INTO requests (caller, key, fingerprint, owner, state, response, time) "
        "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (caller, key) DO UPDATE SET "
        "state = coalesce(excluded.state, state), response = coalesce(excluded.response, response)",
        [
            progress.request.caller,
            progress.request.key,
            fingerprint,
            owner,
            progress.state,
            progress.response,
            now,
        ],
    )
    # Not those that are being answered now.
    ended = "response IS NOT NULL OR owner IS NULL"
    return totals.drop_oldest(db, "requests", MOST_REQUESTS, MOST_BYTES, ended)


def state(db: sqlite3.Connection, request: RequestKey) -> str | None:
    """The stored progress of a request; None without any."""
    found = db.execute(
        "SELECT state FROM requests WHERE caller = ? AND key = ?", [request.caller, request.key]
    ).fetchone()
    return None if found is None else found[0]


def release(db: sqlite3.Connection, request: RequestKey, owner: str) -> None:
    """Ends the ownership of a request without a response; without a state, it is forgotten."""
    mine = [request.caller, request.key, owner]
    condition = "WHERE caller = ? AND key = ? AND owner = ? AND response IS NULL"
    db.execute(f"DELETE FROM requests {condition} AND state IS NULL", mine)
    db.execute(f"UPDATE requests SET owner = NULL {condition}", mine)


def expire(db: sqlite3.Connection, now: float) -> None:
    """Forgets requests that are too old. See `totals.drop_older`."""
    totals.drop_older(db, "requests", now - MOST_SECONDS)
