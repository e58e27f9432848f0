"""Objects that text columns hold as JSON, as objects again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llm_sidecar.db.schema import FEEDBACK, PROPOSALS, RUNS

JSON_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    FEEDBACK: ("feedback_content", "corrected_proposal"),
    RUNS: ("final_output",),
    PROPOSALS: ("proposal",),
}
"""The columns of each table that hold an object as JSON text. In any other column, text that looks
like JSON is a person's or a model's words."""


def with_objects(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in which the objects of its JSON columns are objects.

    Any other text stays as it is, and so does an object that JSON cannot express, such as one with
    NaN, which older versions stored.
    """
    decoded = {name: _object(row[name]) for name in JSON_COLUMNS.get(table, ()) if name in row}
    return {name: decoded.get(name, value) for name, value in row.items()}


def _object(text: Any) -> Any:
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return text
    try:
        value = json.loads(text)
        # NaN is no JSON, and a number such as 1e999 has become infinite.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value
