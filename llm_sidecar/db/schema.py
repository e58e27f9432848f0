"""What a row is: the pydantic models callers fill, and the Arrow schemas of the tables.

Timestamps are aware UTC with microseconds; a naive one counts as UTC. Strings are text as
`llm_sidecar.text` has it. An object in a text column (`feedback_content`, `corrected_proposal`,
`proposal`) is stored as compact JSON text.

Every table has a key, by which a row that is written twice, after a crash for instance, is one row:
`feedback_id`, and elsewhere `row_id`, which no caller sees.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
)

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.input_model import InputModel, TextOrObject

if TYPE_CHECKING:
    import pyarrow as pa

FEEDBACK: Final = "phi3_feedback"
RUNS: Final = "orchestrator_runs"
SCORES: Final = "hermes_scores"
PROPOSALS: Final = "proposals"
TABLES: Final = (FEEDBACK, RUNS, SCORES, PROPOSALS)
ROW_ID: Final = "row_id"
KEYS: Final = {FEEDBACK: "feedback_id", RUNS: ROW_ID, SCORES: ROW_ID, PROPOSALS: ROW_ID}
"""The column of each table that makes two deliveries the same row."""
TRANSACTION: Final = {
    FEEDBACK: "transaction_id",
    RUNS: "run_id",
    SCORES: "run_id",
    PROPOSALS: "transaction_id",
}
"""The column of each table that says to which walk from prompt to proposal a row belongs."""


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


Timestamp = Annotated[datetime.datetime, BeforeValidator(_or_now), AfterValidator(_as_utc)]
JsonObject = dict[str, Any]


class _Row(InputModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: Timestamp = Field(default_factory=_now)

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        values = self.model_dump()
        return {
            name: _compact_json(value) if name in _JSON_TEXT and isinstance(value, dict) else value
            for name, value in values.items()
        }


_JSON_TEXT: Final = frozenset(("feedback_content", "corrected_proposal", "proposal"))


class _Numbered(_Row):
    # Of the object, so that storing the same one again is storing it once.
    _row_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        return super().as_row() | {ROW_ID: self._row_id}


class Phi3FeedbackSchema(_Row):
    """What somebody said of a proposal.

    Attributes:
        feedback_id: makes two deliveries the same feedback. Where none is given it follows from
            transaction, time, type and content; the content, because a clock may count in seconds.
    """

    feedback_id: str | None = Field(None, min_length=1, max_length=128)
    transaction_id: str = Field(min_length=1)
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"]
    feedback_content: TextOrObject
    schema_version: str = "1.0"
    corrected_proposal: JsonObject | None = None

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        row = super().as_row()
        return row | {"feedback_id": self.feedback_id or feedback_key(row)}


def feedback_key(row: dict[str, Any]) -> str:
    """The `feedback_id` of feedback that brings none, from its column values."""
    key = json.dumps([str(row[column]) for column in _FEEDBACK_KEY])
    return hashlib.sha256(key.encode()).hexdigest()


_FEEDBACK_KEY: Final = ("transaction_id", "timestamp", "feedback_type", "feedback_content")


class OrchestratorRunSchema(_Numbered):
    """One walk from a prompt to a judged proposal; `run_id` is its transaction_id.

    Attributes:
        status: the sidecar writes `success`; `partial` for a proposal that Hermes has not fully
            assessed; `error` for a run without a proposal.
    """

    run_id: str = Field(min_length=1)
    input_query: str
    final_output: str
    status: str = Field(min_length=1)
    error_message: str | None = None


class HermesScoreSchema(_Numbered):
    """A score in [0, 1]; `run_id` is the proposal's id."""

    run_id: str = Field(min_length=1)
    score: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rationale: str = ""


class Latencies(BaseModel):
    """Seconds, queueing included; None for a part that did not happen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposal: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    assessment: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    score: float | None = Field(None, ge=0.0, allow_inf_nan=False)


class ProposalSchema(_Numbered):
    """A proposal with everything that made and judged it, so that a correction can be joined.

    Attributes:
        score: Hermes' score in [0, 1]; None where there is none.
        model: the name of the model that wrote the proposal.
        adapter: the name of its adapter; None without one.
        grounded: `true`, or the fields whose ticker or numbers are not in the prompt, separated by
            commas; None where nobody looked.
    """

    transaction_id: str = Field(min_length=1)
    prompt: str
    proposal: JsonObject
    assessment: str = ""
    score: float | None = Field(None, ge=0.0, le=1.0, allow_inf_nan=False)
    model: str
    adapter: str | None = None
    latencies: Latencies = Latencies()
    grounded: str | None = None


SCHEMAS: Final[dict[str, type[_Row]]] = {
    FEEDBACK: Phi3FeedbackSchema,
    RUNS: OrchestratorRunSchema,
    SCORES: HermesScoreSchema,
    PROPOSALS: ProposalSchema,
}
"""The pydantic model of each table."""

VERSION: Final = "3"
"""Of the tables' shapes, in their Arrow metadata: 2 has keys and aware timestamps in microseconds,
3 has `grounded`. Version 1 is whatever was written before; `migrate` brings all of them here."""
_VERSION_KEY: Final = b"osiris_schema_version"


def is_known(table: str, row: dict[str, Any]) -> bool:
    """Whether a row, by its columns, can be stored today: one of an older version may lack columns
    that take nulls."""
    if table not in TABLES:
        return False
    schema = arrow_schemas()[table]
    required = {field.name for field in schema if not field.nullable}
    return required <= set(row) <= set(schema.names)


def is_current(table: str, schema: pa.Schema) -> bool:
    """Whether an Arrow schema is today's of that table."""
    version = (schema.metadata or {}).get(_VERSION_KEY)
    return bool(schema.equals(arrow_schemas()[table]) and version == VERSION.encode())


def require_not_newer(table: str, schema: pa.Schema) -> None:
    """Raises DatabaseUnavailable for a table that a later version of the sidecar has written."""
    version = (schema.metadata or {}).get(_VERSION_KEY, b"1").decode()
    if not version.isdigit() or int(version) > int(VERSION):
        raise DatabaseUnavailable(
            f"The table {table} is of version {version}, and this sidecar knows {VERSION}; "
            "update the sidecar.",
            retry_after=30,
        )


@functools.cache
def arrow_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every table, in the order of `TABLES`."""
    import pyarrow as pa

    def text(name: str, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.string(), nullable)

    def number(name: str, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.float64(), nullable)

    time = pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False)
    columns = {
        FEEDBACK: [
            text("transaction_id"),
            time,
            text("feedback_type"),
            text("feedback_content"),
            text("schema_version"),
            text("corrected_proposal", nullable=True),
        ],
        RUNS: [
            text("run_id"),
            time,
            text("input_query"),
            text("final_output"),
            text("status"),
            text("error_message", nullable=True),
        ],
        SCORES: [text("run_id"), time, number("score"), text("rationale")],
        PROPOSALS: [
            text("transaction_id"),
            time,
            text("prompt"),
            text("proposal"),
            text("assessment"),
            number("score", nullable=True),
            text("model"),
            text("adapter", nullable=True),
            pa.field(
                "latencies",
                pa.struct([number(name, nullable=True) for name in Latencies.model_fields]),
                nullable=False,
            ),
            text("grounded", nullable=True),
        ],
    }
    # The metadata makes two processes that insert the same key at once conflict, and one retry.
    unique = {"lance-schema:unenforced-primary-key": "true"}
    return {
        table: pa.schema(
            [*columns[table], text(KEYS[table]).with_metadata(unique)],
            metadata={_VERSION_KEY: VERSION},
        )
        for table in TABLES
    }
