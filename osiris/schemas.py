"""Request and response models of the HTTP contract."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
)

from llm_sidecar.input_model import InputModel, TextOrObject
from llm_sidecar.proposals import Proposal
from llm_sidecar.timestamps import Timestamp

MAX_LENGTH: Final = 8192
"""Tokens."""
MAX_SPEECH: Final = 5_000
"""Characters of one spoken text."""

# How long it may be is a setting; what the model's own context holds is checked where its tokenizer
# is.
Prompt = Annotated[str, Field(min_length=1, pattern=r"\S")]
ModelId = Literal["hermes", "phi3"]


class _Request(InputModel):
    model_config = ConfigDict(extra="forbid")

    known_keys = frozenset(Proposal.model_fields)


class PromptRequest(_Request):
    """What to generate from."""

    prompt: Prompt = Field(examples=["Long AAPL from 182.40, now 191.10, RSI 78 after an 8 % run."])
    max_length: int = Field(256, ge=1, le=MAX_LENGTH, description="greatest number of new tokens")


class GenerateRequest(PromptRequest):
    """A prompt and which model it goes to; the query parameter `model_id` says it as well."""

    model_id: ModelId | None = Field(None, description="`hermes` unless given")


class ScoreRequest(_Request):
    """A proposal to score; its `id`, when that is a UUID, becomes the proposal_id."""

    proposal: dict[str, Any] = Field(min_length=1)
    context: str | None = None


class FeedbackRequest(_Request):
    """What somebody says of a proposal."""

    transaction_id: str = Field(min_length=1, max_length=256)
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"]
    feedback_content: TextOrObject
    timestamp: Timestamp | None = Field(
        None, description="when the feedback was given; now by default"
    )
    corrected_proposal: dict[str, Any] | None = None
    schema_version: str = Field("1.0", min_length=1, max_length=32)


class SpeakRequest(_Request):
    """A text to speak, how, and with whose voice."""

    not_text = frozenset({"ref_wav_b64"})

    text: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_SPEECH)
    ] = Field(examples=["Take the profit on AAPL: RSI is at 78."])
    exaggeration: float = Field(
        0.5,
        ge=0,
        le=2,
        allow_inf_nan=False,
        strict=True,
        description="0 is flat, 0.5 neutral, 2 theatrical",
    )
    ref_wav_b64: str | None = Field(
        None,
        description="base64 of a WAV of 1 to 30 s and at most 10 MB, whose voice to speak with",
    )


class GeneratedText(BaseModel):
    """Hermes' answer."""

    generated_text: str


class TradeAdjustment(BaseModel):
    """A proposal and what Hermes says of it."""

    transaction_id: uuid.UUID
    phi3_proposal: Proposal
    hermes_assessment: str


class Score(BaseModel):
    """A score, and the id under which it is stored."""

    proposal_id: uuid.UUID
    score: float = Field(ge=0, le=1)


class FeedbackStored(BaseModel):
    """Feedback that is durable."""

    message: str
    transaction_id: str


class FeedbackWithdrawn(BaseModel):
    """Feedback that was withdrawn: neither a few-shot example nor training data any more."""

    message: str
    feedback_id: str


class ExampleInUse(BaseModel):
    """A few-shot example: the prompt of a stored run, and its corrected proposal."""

    transaction_id: str
    feedback_id: str
    prompt: str
    proposal: dict[str, Any]


class Examples(BaseModel):
    """A page of the few-shot examples in use, oldest first."""

    items: list[ExampleInUse]
    next: str | None = Field(description="`before` for the next page; null on the last page")


class AdapterChoice(_Request):
    """Which adapter to take into use: the newest where none is named."""

    adapter: str | None = Field(default=None, pattern=r"^[0-9]{8}(-dpo)?$")


class AdapterSwapped(BaseModel):
    """The adapter in use."""

    status: Literal["ok"]
    phi3_adapter_date: str | None


class ErrorBody(BaseModel):
    """What went wrong, in one sentence, or for bad input one entry for every bad field."""

    detail: str | list[dict[str, Any]]


class ProposalErrorBody(ErrorBody):
    """What went wrong, and the id of a proposal that was stored before the error."""

    transaction_id: uuid.UUID | None = Field(
        None, description="present if Hermes failed after Phi-3 had finished"
    )


class HealthStatus(BaseModel):
    """The state of the whole: what `/health` shows without an API key where keys are set."""

    status: Literal["ok", "partial_error", "error"]


class Health(HealthStatus):
    """The state of the whole and of each part."""

    version: str = Field(description="of the sidecar")
    uptime_seconds: float = Field(ge=0, description="since the server has started")
    hermes_loaded: bool
    phi3_loaded: bool
    phi3_model_file_exists: bool
    device: str
    phi3_adapter_date: str | None
    mean_hermes_score_last_24h: float | None
    num_hermes_scores_last_24h: int
    models: dict[str, dict[str, Any]]
    event_bus: dict[str, Any]
    database: dict[str, Any]
    speech: dict[str, Any]


class Probe(BaseModel):
    """What a probe says."""

    status: Literal["ok", "unavailable", "draining"]
    missing: list[str] = Field([], description="the parts without which requests fail")
    reasons: dict[str, str] | None = Field(
        None,
        description="why, for each of them; left out where nothing is missing, and without an API "
        "key where keys are set",
    )
