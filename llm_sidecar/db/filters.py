"""Filters for rows: status, ticker, action, model, score.

Ticker and action are inside JSON text. The database first selects rows that contain the value as
JSON text anywhere. Then each row is checked for whether the right key has the value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llm_sidecar.db.nested import json_object
from llm_sidecar.db.rows import FEEDBACK, PROPOSALS, RUNS, SCORES

_PROPOSAL_PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    RUNS: ("final_output", "proposal"),
    FEEDBACK: ("corrected_proposal",),
    PROPOSALS: ("proposal",),
}
"""For each table that has proposals: the column, and the key inside its JSON."""
_FILTERS: Final[Mapping[str, tuple[str, ...]]] = {
    "status": (RUNS,),
    "ticker": tuple(_PROPOSAL_PATHS),
    "action": tuple(_PROPOSAL_PATHS),
    "model": (PROPOSALS,),
    "min_score": (RUNS, SCORES, PROPOSALS),
}
"""The tables that each filter applies to."""


@dataclass(frozen=True, slots=True)
class Filters:
    """The values that a row must have; None matches every row.

    Attributes:
        status: the status of a run.
        ticker, action: exact values of the proposal.
        model: the name of the model that wrote the proposal.
        min_score: the minimum score, in [0, 1]; a row without a score does not match.
    """

    status: str | None = None
    ticker: str | None = None
    action: str | None = None
    model: str | None = None
    min_score: float | None = None

    def names(self) -> list[str]:
        """The filters that are set."""
        return [name for name in _FILTERS if getattr(self, name) is not None]

    def misplaced(self, table: str) -> tuple[str, tuple[str, ...]] | None:
        """The first filter that does not apply to the table, and the tables to which it applies."""
        for name in self.names():
            if table not in _FILTERS[name]:
                return name, _FILTERS[name]
        return None

    def conditions(self, table: str) -> list[Any]:
        """Conditions for lancedb. Every matching row fulfils them, but other rows may too."""
        from lancedb.expr import col, lit

        found = [
            col(name).eq(lit(value))
            for name, value in (("status", self.status), ("model", self.model))
            if value is not None
        ]
        for value in (self.ticker, self.action):
            if value is not None:
                column = col(_PROPOSAL_PATHS[table][0])
                condition = column.contains(lit(json.dumps(value)))
                if not value.isascii():
                    # This version escapes these characters, but other writers may not.
                    plain = json.dumps(value, ensure_ascii=False)
                    condition = condition.or_(column.contains(lit(plain)))
                found.append(condition)
        if self.min_score is not None and table != RUNS:
            found.append(col("score").gte(lit(self.min_score)))
        return found

    def matches(self, table: str, row: Mapping[str, Any]) -> bool:
        """Whether a row of the table matches."""
        if any(
            value is not None and row[name] != value
            for name, value in (("status", self.status), ("model", self.model))
        ):
            return False
        if self.min_score is not None and not _reaches(_score(table, row), self.min_score):
            return False
        if self.ticker is None and self.action is None:
            return True
        proposal = _proposal(table, row)
        return all(
            value is None or proposal.get(name) == value
            for name, value in (("ticker", self.ticker), ("action", self.action))
        )


def _reaches(score: object, least: float) -> bool:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return is_number and score >= least  # type: ignore[operator]


def _score(table: str, row: Mapping[str, Any]) -> object:
    if table == RUNS:
        return (json_object(row["final_output"]) or {}).get("score")
    return row["score"]


def _proposal(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    column, *keys = _PROPOSAL_PATHS[table]
    found = json_object(row[column]) or {}
    for key in keys:
        inner = found.get(key)
        found = inner if isinstance(inner, dict) else {}
    return found
