"""Request and response models of the HTTP contract.

The OpenAPI document is made from them, so every field says its meaning and unit, and has
an example.
"""

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
from llm_sidecar.proposals import MAX_COMPLETION_TOKENS, Proposal
from llm_sidecar.timestamps import Timestamp

MAX_LENGTH: Final = 8192
"""Tokens."""
MAX_SPEECH: Final = 5_000
"""Characters of one spoken text."""

_PROMPT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after an 8 % run."
_TRANSACTION: Final = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
_FEEDBACK: Final = "9f2c1d64a7d0"
_PROPOSAL: Final[dict[str, Any]] = {
    "ticker": "AAPL",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.5,
    "new_target_pct": 4.0,
    "confidence": 0.72,
    "rationale": "RSI at 78 calls for a tighter stop.",
}

# The greatest length is a setting; the tokenizer checks what fits the model's context.
Prompt = Annotated[str, Field(min_length=1, pattern=r"\S")]
ModelId = Literal["hermes", "phi3"]
MODEL_ID: Final = (
    "which model answers: `hermes` (free text) or `phi3` (a trade proposal); `hermes` unless given"
)


class _Request(InputModel):
    # No value is converted from another type: text is no number, and 12.0 is no integer.
    model_config = ConfigDict(extra="forbid", strict=True)

    known_keys = frozenset(Proposal.model_fields)


class PromptRequest(_Request):
    """What to generate from."""

    prompt: Prompt = Field(
        description="the market context, or a question for Hermes; not blank, and without control "
        "characters but tab, newline and carriage return",
        examples=[_PROMPT],
    )
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        description="the greatest number of new tokens, per model call",
        examples=[256],
    )


class ProposalRequest(PromptRequest):
    """What to write a trade proposal from."""

    # A smaller number is refused with a sentence that says why, so only the document has the bound.
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        json_schema_extra={"minimum": MAX_COMPLETION_TOKENS},
        description="the greatest number of new tokens, per model call; at least as many as the "
        "longest proposal can take",
        examples=[256],
    )


class GenerateRequest(PromptRequest):
    """A prompt, and which model it goes to; the query parameter `model_id` says it as well."""

    model_id: ModelId | None = Field(
        None, description=f"{MODEL_ID} here or in the query", examples=["phi3"]
    )


class ScoreRequest(_Request):
    """A proposal to score."""

    proposal: dict[str, Any] = Field(
        min_length=1,
        description="the proposal, with any keys; its `id`, if that is a UUID, becomes the "
        "`proposal_id`",
        examples=[_PROPOSAL],
    )
    context: str | None = Field(
        None,
        description="the market context that the proposal is judged against; none unless given",
        examples=[_PROMPT],
    )


class FeedbackRequest(_Request):
    """Somebody's feedback on a proposal."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "transaction_id": _TRANSACTION,
                    "feedback_type": "correction",
                    "feedback_content": "The stop is too tight.",
                    "corrected_proposal": _PROPOSAL | {"new_stop_pct": 3.5},
                }
            ]
        }
    )

    transaction_id: str = Field(
        min_length=1,
        max_length=256,
        description="the proposal's, as `/propose_trade_adjustments/` gave it",
        examples=[_TRANSACTION],
    )
    feedback_type: Literal["correction", "rating", "qualitative_comment", "human_edit"] = Field(
        description="`correction`: `corrected_proposal` is what it should have been; `rating`: a "
        "mark; `qualitative_comment`: free text; `human_edit`: a person changed the proposal",
        examples=["correction"],
    )
    feedback_content: TextOrObject = Field(
        description="the feedback itself: text, or an object with keys of your own",
        examples=["The stop is too tight.", {"stars": 4}],
    )
    timestamp: Timestamp | None = Field(
        None,
        description="when the feedback was given, in ISO 8601, UTC unless it has an offset; at "
        "most five minutes ahead of the sidecar's clock; now unless given",
        examples=["2026-01-31T10:00:00Z"],
    )
    corrected_proposal: dict[str, Any] | None = Field(
        None,
        description="the proposal as it should have been; a valid one becomes a few-shot example",
        examples=[_PROPOSAL | {"new_stop_pct": 3.5}],
    )
    schema_version: str = Field(
        "1.0",
        min_length=1,
        max_length=32,
        description="the version of the feedback's format",
        examples=["1.0"],
    )


class SpeakRequest(_Request):
    """A text to speak, how, and with whose voice."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "Take the profit on AAPL: RSI is at 78.", "exaggeration": 0.5}]
        }
    )

    not_text = frozenset({"ref_wav_b64"})

    text: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_SPEECH)
    ] = Field(
        description="what to say, in English; spaces around it are removed",
        examples=["Take the profit on AAPL: RSI is at 78."],
    )
    exaggeration: float = Field(
        0.5,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="how expressive it is: 0 is flat, 0.5 neutral, 2 theatrical",
        examples=[0.5],
    )
    ref_wav_b64: str | None = Field(
        None,
        description="base64 of a WAV of 1 to 30 s and at most 10 MB, whose voice to speak with; "
        "null for the default voice (the example is the beginning of such a text)",
        examples=["UklGRiR9AABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQB9AAA="],
    )


class GeneratedText(BaseModel):
    """Hermes' answer."""

    generated_text: str = Field(
        description="the new text, without the prompt", examples=["AAPL looks overbought."]
    )


class TradeAdjustment(BaseModel):
    """A proposal, and Hermes' critique of it."""

    transaction_id: uuid.UUID = Field(
        description="the id under which the proposal is stored, and to which feedback refers",
        examples=[_TRANSACTION],
    )
    phi3_proposal: Proposal = Field(description="Phi-3's proposal", examples=[_PROPOSAL])
    hermes_assessment: str = Field(
        description="Hermes' critique, in plain text; its score is in `X-Hermes-Score`",
        examples=["The tighter stop fits an overbought market."],
    )


class Score(BaseModel):
    """A score, and the id under which it is stored."""

    proposal_id: uuid.UUID = Field(
        description="the proposal's own `id` if that is a UUID, otherwise a new one",
        examples=[_TRANSACTION],
    )
    score: float = Field(
        ge=0,
        le=1,
        description="how good Hermes thinks the proposal is: 0 is worst, 1 is best",
        examples=[0.75],
    )


class FeedbackStored(BaseModel):
    """Feedback that is durable."""

    message: str = Field(
        description="one sentence: what was stored, and whether the corrected proposal is a "
        "few-shot example now, or why not",
        examples=["Feedback stored; the corrected proposal is an example for the next ones."],
    )
    transaction_id: str = Field(description="the request's", examples=[_TRANSACTION])


class FeedbackWithdrawn(BaseModel):
    """Feedback that was withdrawn: neither a few-shot example nor training data any more."""

    message: str = Field(description="one sentence", examples=["Feedback withdrawn."])
    feedback_id: str = Field(description="the one in the path", examples=[_FEEDBACK])


class ExampleInUse(BaseModel):
    """A few-shot example: the prompt of a stored run, and its corrected proposal."""

    transaction_id: str = Field(
        description="of the run whose proposal was corrected", examples=[_TRANSACTION]
    )
    feedback_id: str = Field(
        description="of the correction; `DELETE /feedback/{feedback_id}` withdraws it",
        examples=[_FEEDBACK],
    )
    prompt: str = Field(description="the run's prompt", examples=[_PROMPT])
    proposal: dict[str, Any] = Field(
        description="the corrected proposal", examples=[_PROPOSAL | {"new_stop_pct": 3.5}]
    )


class Examples(BaseModel):
    """A page of the few-shot examples in use, oldest first."""

    items: list[ExampleInUse] = Field(
        description="the examples of this page",
        examples=[
            [
                {
                    "transaction_id": _TRANSACTION,
                    "feedback_id": _FEEDBACK,
                    "prompt": _PROMPT,
                    "proposal": _PROPOSAL | {"new_stop_pct": 3.5},
                }
            ]
        ],
    )
    next: str | None = Field(
        description="`before` for the next page; null on the last page", examples=[_FEEDBACK]
    )


class AudioEvent(BaseModel):
    """One event of `/stream/audio`."""

    event: Literal["lost"] | None = Field(
        None,
        description="absent for a WAV file; `lost`: this listener was too slow and missed some",
        examples=["lost"],
    )
    data: str = Field(
        description="a whole WAV file in base64 (the example is the beginning of one), or the "
        "number of WAV files that were missed",
        examples=["UklGRiQAAABXQVZFZm10IA==", "3"],
    )


class AdapterChoice(_Request):
    """Which adapter to use."""

    adapter: str | None = Field(
        default=None,
        pattern=r"^[0-9]{8}(-dpo)?$",
        description="the adapter's folder, `YYYYMMDD` or `YYYYMMDD-dpo`; the newest unless given",
        examples=["20260131-dpo"],
    )


class AdapterSwapped(BaseModel):
    """The adapter in use."""

    status: Literal["ok"] = Field(
        description="`ok`: the adapter is in use for every request from now on", examples=["ok"]
    )
    phi3_adapter_date: str | None = Field(
        description="the date of the adapter in use, `YYYY-MM-DD`; null without one",
        examples=["2026-01-31"],
    )


class ErrorBody(BaseModel):
    """An error."""

    detail: str = Field(
        description="one sentence: what is wrong, and what to do",
        examples=["The phi3 queue is full; try again in 3 s."],
    )


class FieldError(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int] = Field(
        description="where the field is: `body`, `query` or `path`, then names and indexes; `*` "
        "stands for a name that the caller made up",
        examples=[["body", "prompt"]],
    )
    msg: str = Field(description="what is wrong, in words", examples=["Field required"])
    type: str = Field(description="what is wrong, for programs", examples=["missing"])


class BadInput(BaseModel):
    """Bad input: one sentence, or one entry for every bad field."""

    detail: str | list[FieldError] = Field(
        description="a sentence where the request as a whole cannot be served; a list where "
        "fields are not valid",
        examples=[
            [{"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"}],
            "max_length: a proposal can take 213 tokens; send at least that",
        ],
    )


class ProposalErrorBody(ErrorBody):
    """An error, and the id of a proposal that was stored before it."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the stored proposal's; absent if none is stored",
        examples=[_TRANSACTION],
    )


class ProposalBadInput(BadInput):
    """Bad input, and the id of a proposal that was stored before it was found out."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the stored proposal's; absent if none is stored",
        examples=[_TRANSACTION],
    )
