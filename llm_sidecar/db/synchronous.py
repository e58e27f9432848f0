"""The database for synchronous code: each call opens it, does one thing and closes it again.

Async code uses `Store`, which stays open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_sidecar.db.interruptible import run
from llm_sidecar.db.location import default_uri
from llm_sidecar.db.rows import HermesScoreSchema, OrchestratorRunSchema, Phi3FeedbackSchema
from llm_sidecar.db.store import AnyRow, Store
from llm_sidecar.input_model import check_length
from llm_sidecar.settings import default_max_chars


def init_db(uri: str | None = None) -> None:
    """Creates the database and the tables that are missing.

    Args:
        uri: a folder or an `s3://` address; `LANCEDB_URI` unless given.

    Raises:
        DatabaseUnavailable: it cannot be opened.
    """

    async def create() -> None:
        await (await Store.open(uri or default_uri())).close()

    run(create())


def append_feedback(row: Phi3FeedbackSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores feedback and returns when it would survive a power loss. Repeated feedback is stored
    once.

    Raises:
        pydantic.ValidationError: it is not valid feedback, or a text in it is longer than
            MAX_PROMPT_CHARS. The error names the field and does not quote it.
        SettingsError: MAX_PROMPT_CHARS is not valid.
        DatabaseUnavailable: it is not certain that the row is stored. Storing the same model object
            again is safe; a dict becomes a new row each time, unless it is feedback with a
            `feedback_id` or a `timestamp`.
    """
    _append(Phi3FeedbackSchema.model_validate(row), uri)


def log_run(row: OrchestratorRunSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores a run; returns and raises as `append_feedback` does."""
    _append(OrchestratorRunSchema.model_validate(row), uri)


def log_hermes_score(row: HermesScoreSchema | Mapping[str, Any], *, uri: str | None = None) -> None:
    """Stores a score; returns and raises as `append_feedback` does."""
    _append(HermesScoreSchema.model_validate(row), uri)


def _append(row: AnyRow, uri: str | None) -> None:
    check_length(row, default_max_chars())

    async def append() -> None:
        store = Store(uri or default_uri())
        store.start()
        try:
            await store.append(row, again=True)
        finally:
            await store.close()

    run(append())
