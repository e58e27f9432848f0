"""The names of the tables, and the pydantic model of a row of each.

Timestamps are aware UTC with microseconds; a naive one counts as UTC. Strings are text as defined
in `llm_sidecar.text`. An object in a text column (`feedback_content`, `corrected_proposal`,
`proposal`, `provenance`) is stored as compact JSON text.

Every table has a key, so that a row that is written twice, for example after a crash, is stored
once: `feedback_id` for withdrawals, otherwise `row_id`, which callers do not see.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
)

from llm_sidecar import timestamps
from llm_sidecar.input_model import InputModel, TextOrObject

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
"""The key column of each table."""
TRANSACTION: Final = {
    FEEDBACK: "transaction_id",
    RUNS: "run_id",
    SCORES: "run_id",
    PROPOSALS: "transaction_id",
    WITHDRAWALS: "transaction_id",
}
"""The column of each table that has the transaction of a row."""


def _or_now(value: object) -> object:
    return timestamps.now() if value is None else value


def _compact_json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


Timestamp = Annotated[timestamps.Timestamp, BeforeValidator(_or_now)]
JsonObject = dict[str, Any]
Number = Annotated[float, Strict()]
"""A number that is neither text nor a boolean."""


class _Row(InputModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: Timestamp = Field(default_factory=timestamps.now)

    def as_row(self) -> dict[str, Any]:
        """The values of the columns, for Arrow."""
        values = self.model_dump()
        return {
            name: _compact_json(value) if name in _JSON_TEXT and isinstance(value, dict) else value
            for name, value in values.items()
        }


_JSON_TEXT: Final = frozenset(("feedback_content", "corrected_proposal", "proposal", "provenance"))


class _Numbered(_Row):
    # The id belongs to the object, so that storing an object twice stores one row.
    _row_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def keyed(self, row_id: str) -> Self:
        """A copy with this key. Of several rows with the same key, only the first is stored."""
        copy = self.model_copy()
        copy._row_id = row_id
        return copy

    def as_row(self) -> dict[str, Any]:
        """The values of the columns, for Arrow."""
        return super().as_row() | {ROW_ID: self._row_id}


class Phi3FeedbackSchema(_Row):
    """Feedback on a proposal, over HTTP or from a script.

    Feedback is ordered by the time at which this object was created, by the clock of this process,
    because `timestamp` is set by the caller.

    Attributes:
        feedback_id: feedback with the same id is stored once. The default is a hash of transaction,
            time, type, content and correction. The time alone would not be unique, because a clock
            may count whole seconds.
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
        """The values of the columns, for Arrow."""
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
    to replace a row that came over HTTP. The key of feedback from the inbox is the id of its entry,
    so each entry is stored once.

    Attributes:
        stored_in: the id of the database or sidecar that has already stored it, according to its
            publisher.
        author: according to its publisher; ignored, because messages have no API key.
    """

    SOURCE: ClassVar[Literal["direct", "bus"]] = "bus"
    stored_in: str | None = Field(None, exclude=True)
    author: str | None = Field(None, exclude=True)
    _entry_id: str | None = PrivateAttr(None)

    def from_entry(self, entry_id: str) -> Self:
        """A copy whose key is this id of an inbox entry."""
        copy = self.model_copy()
        copy._entry_id = entry_id
        return copy

    def as_row(self) -> dict[str, Any]:
        """The values of the columns, for Arrow."""
        row = super().as_row()
        return row if self._entry_id is None else row | {ROW_ID: f"inbox:{self._entry_id}"}


def feedback_key(row: Mapping[str, Any]) -> str:
    """The default `feedback_id`, from the column values."""
    values = [str(row[column]) for column in _FEEDBACK_KEY]
    if row["corrected_proposal"] is not None:
        values.append(row["corrected_proposal"])
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


_FEEDBACK_KEY: Final = ("transaction_id", "timestamp", "feedback_type", "feedback_content")


class FeedbackWithdrawalSchema(_Row):
    """Withdrawn feedback: it no longer is a few-shot example or training data."""

    feedback_id: str = Field(min_length=1)
    transaction_id: str = Field(min_length=1)


class OrchestratorRunSchema(_Numbered):
    """One run from a prompt to an assessed proposal.

    Attributes:
        status: `success`; `partial` if Hermes has not fully assessed the proposal; `error` without
            a proposal.
    """

    run_id: str = Field(min_length=1)
    input_query: str
    final_output: str
    status: str = Field(min_length=1)
    error_message: str | None = None


class HermesScoreSchema(_Numbered):
    """A score by Hermes, of a run or on its own.

    Attributes:
        answer_mass: the probability that the answers 0 to 10 had in total, in [0, 1].
        score_reliable: whether that was enough for the score to count. The row keeps the decision,
            because the setting behind it may change. None if the mass is unknown; then it counts.
    """

    run_id: str = Field(min_length=1)
    score: Number = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rationale: str = ""
    answer_mass: Number | None = Field(None, ge=0.0, le=1.0, allow_inf_nan=False)
    score_reliable: bool | None = Field(None, strict=True)


class Latencies(BaseModel):
    """Seconds, including the time in the queue; None for a step that did not happen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposal: Number | None = Field(None, ge=0.0, allow_inf_nan=False)
    assessment: Number | None = Field(None, ge=0.0, allow_inf_nan=False)
    score: Number | None = Field(None, ge=0.0, allow_inf_nan=False)


class ProposalSchema(_Numbered):
    """A stored proposal with its prompt, model, critique and score.

    Attributes:
        score: Hermes' score in [0, 1], or None.
        model: the name of the model that wrote the proposal.
        adapter: the name of its adapter; None without one.
        grounded: `true`, or the fields whose ticker or numbers are not in the prompt, separated by
            commas; None if it was not checked.
        provenance: JSON text; see `services.provenance`.
        answer_mass, score_reliable: of the score; see `HermesScoreSchema`.
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
    provenance: JsonObject | None = None
    answer_mass: Number | None = Field(None, ge=0.0, le=1.0, allow_inf_nan=False)
    score_reliable: bool | None = Field(None, strict=True)


SCHEMAS: Final[dict[str, type[_Row]]] = {
    FEEDBACK: Phi3FeedbackSchema,
    RUNS: OrchestratorRunSchema,
    SCORES: HermesScoreSchema,
    PROPOSALS: ProposalSchema,
    WITHDRAWALS: FeedbackWithdrawalSchema,
}
"""The pydantic model of each table."""
