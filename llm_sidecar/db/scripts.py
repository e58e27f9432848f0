"""The database for scripts: each call opens it, does one thing, and closes it again.

Async code uses `Store`, which stays open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llm_sidecar.db.schema import HermesScoreSchema, OrchestratorRunSchema, Phi3FeedbackSchema
from llm_sidecar.db.store import Store, default_uri


def init_db(uri: str | None = None) -> None:
    """Creates the database and the tables that are missing.

    Args:
        uri: a folder or an `s3://` address; `LANCEDB_URI` unless given.

    Raises:
        DatabaseUnavailable: it cannot be opened.
    """

    async def nothing(_: Store) -> None:
        return

    _with_store(nothing, uri)


def append_feedback(row: Phi3FeedbackSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores feedback, once however often it comes.

    Raises:
        pydantic.ValidationError: a dict is no feedback.
        DatabaseUnavailable: it is not certain that the row is stored; a retry is safe.
    """
    _with_store(lambda store: store.append_feedback(row), uri)


def log_run(row: OrchestratorRunSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores a run; raises as `append_feedback` does."""
    _with_store(lambda store: store.log_run(row), uri)


def log_hermes_score(row: HermesScoreSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores a score; raises as `append_feedback` does."""
    _with_store(lambda store: store.log_hermes_score(row), uri)


def _with_store(work: Callable[[Store], Awaitable[None]], uri: str | None) -> None:
    async def once() -> None:
        store = await Store.open(uri or default_uri())
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(once())
