"""What a row is: the pydantic models callers fill, and the Arrow schemas of the tables.

Timestamps are aware UTC with microseconds; a naive one counts as UTC. Strings are text as
`llm_sidecar.text` has it. An object in a text column (`feedback_content`, `corrected_proposal`,
`proposal`) is stored as compact JSON text.

Every table has a key, by which a row that is written twice, after a crash for instance, is one row:
`row_id`, which no caller sees; for withdrawals it is `feedback_id`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
)

from llm_sidecar import timestamps
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.input_model import InputModel, TextOrObject

if TYPE_CHECKING:
    import pyarrow as pa

FEEDBACK: Final = "phi3_feedback"
RUNS: Final = "orchestrator_runs"
SCORES: Final = "hermes_scores"
PROPOSALS: Final = "proposals"
WITHDRAWALS: Final = "feedback_withdrawals"
TABLES: Final = (FEEDBACK, RUNS, SCORES, PROPOSALS, WITHDRAWALS)
ROW_ID: Final = "row_id"
FEEDBACK_ID: Final = "feedback_id"
KEYS: Final = {
    FEEDBACK: ROW_ID,
    RUNS: ROW_ID,
    SCORES: ROW_ID,
    PROPOSALS: ROW_ID,
    WITHDRAWALS: FEEDBACK_ID,
}
"""The column of each table that makes two deliveries the same row."""
TRANSACTION: Final = {
    FEEDBACK: "transaction_id",
    RUNS: "run_id",
    SCORES: "run_id",
    PROPOSALS: "transaction_id",
    WITHDRAWALS: "transaction_id",
}
"""The column of each table that says to which walk from prompt to proposal a row belongs."""


def _or_now(value: object) -> object:
    return timestamps.now() if value is None else value


def _compact_json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


Timestamp = Annotated[timestamps.Timestamp, BeforeValidator(_or_now)]
JsonObject = dict[str, Any]
Number = Annotated[float, Strict()]
"""Neither text nor a boolean."""


class _Row(InputModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: Timestamp = Field(default_factory=timestamps.now)

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
    """Feedback on a proposal, over HTTP or from a script.

    Feedback is ordered by the time at which this object was created, by the clock of this process,
    because `timestamp` is set by the caller.

    Attributes:
        feedback_id: makes two deliveries the same feedback. Where none is given it follows from
            transaction, time, type, content and correction. The time alone is not enough: a clock
            may count in whole seconds.
    """

    SOURCE: ClassVar[Literal["direct", "bus"]] = "direct"
    feedback_id: str | None = Field(None, min_length=1, max_length=128)
    transaction_id: str = Field(min_length=1)
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"]
    feedback_content: TextOrObject
    schema_version: str = "1.0"
    corrected_proposal: JsonObject | None = None
    # Private, so that neither callers nor messages can set them.
    _received: datetime.datetime = PrivateAttr(default_factory=timestamps.now)
    _author: str | None = PrivateAttr(None)

    def written_by(self, author: str | None) -> Self:
        """A copy with its author: the name of the API key that sent it."""
        copy = self.model_copy()
        copy._author = author
        return copy

    def as_row(self) -> dict[str, Any]:
        """Column values as Arrow takes them."""
        row = super().as_row()
        feedback_id = self.feedback_id or feedback_key(row)
        return row | {
            FEEDBACK_ID: feedback_id,
            "received": self._received,
            "source": self.SOURCE,
            "author": self._author,
            ROW_ID: feedback_id if self.SOURCE == "direct" else f"{self.SOURCE}:{feedback_id}",
        }


class PublishedFeedback(Phi3FeedbackSchema):
    """Feedback that another service published on the event bus.

    Its `row_id` has a prefix, because the publisher chooses the `feedback_id` and must not be able
    to replace a row that came over HTTP.

    Attributes:
        stored_in: the id of the database or sidecar that has stored it already, according to its
            publisher.
        author: according to its publisher; ignored, because the publisher shows no API key.
    """

    SOURCE: ClassVar[Literal["direct", "bus"]] = "bus"
    stored_in: str | None = Field(None, exclude=True)
    author: str | None = Field(None, exclude=True)


def feedback_key(row: Mapping[str, Any]) -> str:
    """The `feedback_id` of feedback that brings none, from its column values."""
    parts = [str(row[column]) for column in _FEEDBACK_KEY]
    if row["corrected_proposal"] is not None:
        parts.append(row["corrected_proposal"])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_FEEDBACK_KEY: Final = ("transaction_id", "timestamp", "feedback_type", "feedback_content")


class FeedbackWithdrawalSchema(_Row):
    """Feedback that was withdrawn: it is no few-shot example and no training data any more."""

    feedback_id: str = Field(min_length=1)
    transaction_id: str = Field(min_length=1)


class OrchestratorRunSchema(_Numbered):
    """One run from a prompt to an assessed proposal.

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
    """A score of Hermes, alone or within a run."""

    run_id: str = Field(min_length=1)
    score: Number = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rationale: str = ""


class Latencies(BaseModel):
    """Seconds, queueing included; None for a part that did not happen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposal: Number | None = Field(None, ge=0.0, allow_inf_nan=False)
    assessment: Number | None = Field(None, ge=0.0, allow_inf_nan=False)
    score: Number | None = Field(None, ge=0.0, allow_inf_nan=False)


class ProposalSchema(_Numbered):
    """A stored proposal with its prompt, model, critique and score.

    Attributes:
        score: Hermes' score in [0, 1]; None where there is none.
        model: the name of the model that wrote the proposal.
        adapter: the name of its adapter; None without one.
        grounded: `true`, or the fields whose ticker or numbers are not in the prompt, separated by
            commas; None where it was not checked.
    """

    transaction_id: str = Field(min_length=1)
    prompt: str
    proposal: JsonObject
    assessment: str = ""
    score: Number | None = Field(None, ge=0.0, le=1.0, allow_inf_nan=False)
    model: str
    adapter: str | None = None
    latencies: Latencies = Latencies()
    grounded: str | None = None


SCHEMAS: Final[dict[str, type[_Row]]] = {
    FEEDBACK: Phi3FeedbackSchema,
    RUNS: OrchestratorRunSchema,
    SCORES: HermesScoreSchema,
    PROPOSALS: ProposalSchema,
    WITHDRAWALS: FeedbackWithdrawalSchema,
}
"""The pydantic model of each table."""

VERSION: Final = "4"
"""Of the tables' schemas, in their Arrow metadata. Version 2 added keys and aware timestamps in
microseconds; version 3 added the columns in `ADDED`, `grounded` and the table of withdrawals;
version 4 added `author`. Version 1 is everything before. `migrate` upgrades all of them."""
_VERSION_KEY: Final = b"osiris_schema_version"
_DATABASE_KEY: Final = b"osiris_database"

ADDED: Final[dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]]] = {
    FEEDBACK: {
        # With a timestamp in the future, feedback would stay the newest until then.
        "received": lambda row: min(row["timestamp"], timestamps.now()),
        "source": lambda row: Phi3FeedbackSchema.SOURCE,
        ROW_ID: lambda row: row[FEEDBACK_ID],
    },
}
"""Columns that version 2 lacks and that cannot be null; each with the value for an old row."""


def upgraded(table: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of version 2 or later with all current columns; None for any other row.

    Logs of processes that have died may hold rows of older versions.
    """
    if table not in TABLES:
        return None
    schema, added = arrow_schemas()[table], ADDED.get(table, {})
    whole = dict(row)
    for field in schema:
        if field.name not in row and field.name in added:
            whole[field.name] = added[field.name](row)
        elif field.name not in row and field.nullable:
            whole[field.name] = None
    return whole if set(whole) == set(schema.names) else None


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

    def instant(name: str) -> pa.Field:
        return pa.field(name, pa.timestamp("us", tz="UTC"), nullable=False)

    time = instant("timestamp")
    columns = {
        FEEDBACK: [
            text("transaction_id"),
            time,
            text("feedback_type"),
            text("feedback_content"),
            text("schema_version"),
            text("corrected_proposal", nullable=True),
            text(FEEDBACK_ID),
            instant("received"),
            text("source"),
            text("author", nullable=True),
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
        WITHDRAWALS: [text("transaction_id"), time],
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


def new_table_schema(table: str) -> pa.Schema:
    """The Arrow schema to create a table with. That of feedback has a new id for the database."""
    schema = arrow_schemas()[table]
    if table != FEEDBACK:
        return schema
    return schema.with_metadata({**schema.metadata, _DATABASE_KEY: uuid.uuid4().hex.encode()})


def database_id(schema: pa.Schema) -> str | None:
    """The database's id, from the schema of its feedback table; None where it has none."""
    found: bytes | None = (schema.metadata or {}).get(_DATABASE_KEY)
    return None if found is None else found.decode()
