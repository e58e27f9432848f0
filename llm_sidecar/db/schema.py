"""What a row is: the pydantic models callers fill, and the Arrow schemas of the tables.

Timestamps are aware UTC with microseconds; a naive one counts as UTC. An object in a text column
(`feedback_content`, `corrected_proposal`) is stored as compact JSON text.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    import pyarrow as pa

FEEDBACK: Final = "phi3_feedback"
RUNS: Final = "orchestrator_runs"
SCORES: Final = "hermes_scores"
TABLES: Final = (FEEDBACK, RUNS, SCORES)


_DEEPEST: Final = 64
"""Levels of an object; whoever writes it as JSON recurses as deep."""


def _as_utc(value: datetime.datetime) -> datetime.datetime:
    if value.tzinfo is None:
        return value.replace(tzinfo=datetime.UTC)
    try:
        return value.astimezone(datetime.UTC)
    except OverflowError:
        raise ValueError("in UTC it lies outside the years 1 to 9999") from None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _or_now(value: object) -> object:
    return _now() if value is None else value


def _compact_json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    if _depth(value) > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    try:
        _compact_json(value)
    except (TypeError, ValueError):
        raise ValueError("it cannot be written as JSON") from None
    return value


def _depth(value: object) -> int:
    """How deep objects and lists are nested, counted up to one more than `_DEEPEST`."""
    depth, layer = 0, [value]
    while layer and depth <= _DEEPEST:
        parts = [part for part in layer if isinstance(part, dict | list)]
        depth += bool(parts)
        layer = [
            inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)
        ]
    return depth


Timestamp = Annotated[datetime.datetime, BeforeValidator(_or_now), AfterValidator(_as_utc)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: Timestamp = Field(default_factory=_now)

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        return {
            name: _compact_json(value) if isinstance(value, dict) else value
            for name, value in self.model_dump().items()
        }


class Phi3FeedbackSchema(_Row):
    """What somebody said of a proposal.

    Attributes:
        feedback_id: makes two deliveries the same feedback. Where none is given it follows from
            transaction, time, type and content; the content, because a clock may count in seconds.
    """

    feedback_id: str | None = Field(None, min_length=1, max_length=128)
    transaction_id: str = Field(min_length=1)
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"]
    feedback_content: str | JsonObject
    schema_version: str = "1.0"
    corrected_proposal: JsonObject | None = None

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        row = super().as_row()
        key = json.dumps([str(row[column]) for column in _FEEDBACK_KEY])
        return row | {"feedback_id": self.feedback_id or hashlib.sha256(key.encode()).hexdigest()}


_FEEDBACK_KEY: Final = ("transaction_id", "timestamp", "feedback_type", "feedback_content")


class OrchestratorRunSchema(_Row):
    """One walk from a prompt to a judged proposal; `run_id` is its transaction_id."""

    run_id: str = Field(min_length=1)
    input_query: str
    final_output: str
    status: str = Field(min_length=1)
    error_message: str | None = None


class HermesScoreSchema(_Row):
    """A score in [0, 1]; `run_id` is the proposal's id."""

    run_id: str = Field(min_length=1)
    score: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rationale: str = ""


def arrow_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every table, in the order of `TABLES`."""
    import pyarrow as pa

    def text(name: str, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.string(), nullable)

    time = pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False)
    return {
        FEEDBACK: pa.schema(
            [
                text("transaction_id"),
                time,
                text("feedback_type"),
                text("feedback_content"),
                text("schema_version"),
                text("corrected_proposal", nullable=True),
                # Makes two processes that insert the same one at once conflict, and one retry.
                text("feedback_id").with_metadata({"lance-schema:unenforced-primary-key": "true"}),
            ]
        ),
        RUNS: pa.schema(
            [
                text("run_id"),
                time,
                text("input_query"),
                text("final_output"),
                text("status"),
                text("error_message", nullable=True),
            ]
        ),
        SCORES: pa.schema(
            [
                text("run_id"),
                time,
                pa.field("score", pa.float64(), nullable=False),
                text("rationale"),
            ]
        ),
    }
