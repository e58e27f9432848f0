"""Feedback on a proposal, and its answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llm_sidecar.input_model import TextOrObject
from llm_sidecar.timestamps import Timestamp
from osiris.schemas import samples
from osiris.schemas.base import RequestBody


class FeedbackRequest(RequestBody):
    """Feedback on a proposal."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "transaction_id": samples.TRANSACTION_ID,
                    "feedback_type": "correction",
                    "feedback_content": "The stop is too tight.",
                    "corrected_proposal": samples.CORRECTED,
                }
            ]
        }
    )

    transaction_id: str = Field(
        min_length=1,
        max_length=256,
        description="the id of the run, from the answer of `/propose_trade_adjustments/`",
        examples=[samples.TRANSACTION_ID],
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
        examples=[samples.CORRECTED],
    )
    schema_version: str = Field(
        "1.0",
        min_length=1,
        max_length=32,
        description="the version of the feedback's format",
        examples=["1.0"],
    )


class FeedbackStored(BaseModel):
    """Feedback that is stored durably."""

    message: str = Field(
        description="one sentence: what was stored, and whether the corrected proposal is a "
        "few-shot example now, or why not",
        examples=["Feedback stored; the corrected proposal is an example for the next ones."],
    )
    transaction_id: str = Field(
        description="the one in the request", examples=[samples.TRANSACTION_ID]
    )


class FeedbackWithdrawn(BaseModel):
    """Feedback that was withdrawn: neither a few-shot example nor training data any more."""

    message: str = Field(description="one sentence", examples=["Feedback withdrawn."])
    feedback_id: str = Field(description="the one in the path", examples=[samples.FEEDBACK_ID])
