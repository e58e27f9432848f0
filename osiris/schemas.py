"""Request and response models of the HTTP contract.

The OpenAPI document is generated from them, so every field has a description with its unit, and an
example.
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

# The maximum length is a setting, and the tokenizer checks what fits the model's context.
Prompt = Annotated[str, Field(min_length=1, pattern=r"\S")]
ModelId = Literal["hermes", "phi3"]
MODEL_ID: Final = (
    "which model answers: `hermes` (free text) or `phi3` (a trade proposal); `hermes` unless given"
)


class _Request(InputModel):
    # No value is converted from another type: text is not a number, and 12.0 is not an integer.
    model_config = ConfigDict(extra="forbid", strict=True)

    known_keys = frozenset(Proposal.model_fields)


class PromptRequest(_Request):
    """A prompt for a model."""

    prompt: Prompt = Field(
        description="the market context, or a question for Hermes; not blank, and without control "
        "characters except tab, newline and carriage return",
        examples=[_PROMPT],
    )
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        description="the maximum number of new tokens per model call",
        examples=[256],
    )


class ProposalRequest(PromptRequest):
    """A prompt for a trade proposal."""

    # Only the document has the minimum: a smaller number is refused with a sentence that says why.
    max_length: int = Field(
        256,
        ge=1,
        le=MAX_LENGTH,
        json_schema_extra={"minimum": MAX_COMPLETION_TOKENS},
        description="the maximum number of new tokens per model call; at least the length of the "
        "longest possible proposal",
        examples=[256],
    )


class GenerateRequest(PromptRequest):
    """A prompt, and the model that answers it; the query parameter `model_id` can also name it."""

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
        description="the market context that the proposal is judged against; optional",
        examples=[_PROMPT],
    )


class FeedbackRequest(_Request):
    """Feedback on a proposal."""

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
        description="the id of the run, from the answer of `/propose_trade_adjustments/`",
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
        "most five minutes ahead of the sidecar's clock; default: now",
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
    """A text to speak, its expression, and the voice to imitate."""

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
        description="base64 of a WAV of 1 to 30 s and at most 10 MB, with the voice to imitate; "
        "null for the default voice (the example is only the beginning of one)",
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
        description="the id of the stored proposal; feedback refers to it",
        examples=[_TRANSACTION],
    )
    phi3_proposal: Proposal = Field(description="Phi-3's proposal", examples=[_PROPOSAL])
    hermes_assessment: str = Field(
        description="Hermes' critique, in plain text; its score is in `X-Hermes-Score`",
        examples=["The tighter stop fits an overbought market."],
    )


class Score(BaseModel):
    """A score and its id."""

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
    """Feedback that is stored durably."""

    message: str = Field(
        description="one sentence: what was stored, and whether the corrected proposal is a "
        "few-shot example now, or why not",
        examples=["Feedback stored; the corrected proposal is an example for the next ones."],
    )
    transaction_id: str = Field(description="the one in the request", examples=[_TRANSACTION])


class FeedbackWithdrawn(BaseModel):
    """Feedback that was withdrawn: neither a few-shot example nor training data any more."""

    message: str = Field(description="one sentence", examples=["Feedback withdrawn."])
    feedback_id: str = Field(description="the one in the path", examples=[_FEEDBACK])


class ExampleInUse(BaseModel):
    """A few-shot example: the prompt of a stored run, and its corrected proposal."""

    transaction_id: str = Field(
        description="the id of the run whose proposal was corrected", examples=[_TRANSACTION]
    )
    feedback_id: str = Field(
        description="the id of the correction; `DELETE /feedback/{feedback_id}` withdraws it",
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
        description="the value of `before` for the next page; null on the last page",
        examples=[_FEEDBACK],
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
        description="the adapter's folder, `YYYYMMDD` or `YYYYMMDD-dpo`; default: the newest",
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
        "stands for a name that is in no schema",
        examples=[["body", "prompt"]],
    )
    msg: str = Field(description="what is wrong, in words", examples=["Field required"])
    type: str = Field(description="what is wrong, for programs", examples=["missing"])


class BadInput(BaseModel):
    """Bad input: one sentence, or one entry for every bad field."""

    detail: str | list[FieldError] = Field(
        description="a sentence if the request as a whole cannot be served; a list if fields "
        "are not valid",
        examples=[
            [{"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"}],
            f"max_length: a proposal can take {MAX_COMPLETION_TOKENS} tokens; send at least that",
        ],
    )


class ProposalErrorBody(ErrorBody):
    """An error, and the id of a proposal that was stored before it."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the id of the stored proposal; absent if none is stored",
        examples=[_TRANSACTION],
    )


class ProposalBadInput(BadInput):
    """Bad input, and the id of a proposal that was stored before the error."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the id of the stored proposal; absent if none is stored",
        examples=[_TRANSACTION],
    )
