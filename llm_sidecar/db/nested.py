"""Decoding of the text columns that contain JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llm_sidecar.db.rows import FEEDBACK, PROPOSALS, RUNS

JSON_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    FEEDBACK: ("feedback_content", "corrected_proposal"),
    RUNS: ("final_output",),
    PROPOSALS: ("proposal", "provenance"),
}
"""The columns of each table that contain an object as JSON text. Text in other columns may look
like JSON, but a person or a model wrote it, so it stays text."""


def json_object(text: str | None) -> dict[str, Any] | None:
    """The JSON object in a text; None for any other text, which older versions may have stored."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def with_objects(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its JSON columns decoded to objects.

    Text that is not a JSON object stays unchanged. So do objects with NaN, which older versions
    stored and JSON does not allow.
    """
    decoded = {name: _object(row[name]) for name in JSON_COLUMNS.get(table, ()) if name in row}
    return {name: decoded.get(name, value) for name, value in row.items()}


def _object(text: Any) -> Any:
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return text
    try:
        value = json.loads(text)
        # NaN is not valid JSON, and a number such as 1e999 has become infinite.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value
