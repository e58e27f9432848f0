"""The few-shot examples in use."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from osiris.schemas import samples


class ExampleInUse(BaseModel):
    """A few-shot example: the prompt of a stored run, and its corrected proposal."""

    transaction_id: str = Field(
        description="the id of the run whose proposal was corrected",
        examples=[samples.TRANSACTION_ID],
    )
    feedback_id: str = Field(
        description="the id of the correction; `DELETE /feedback/{feedback_id}` withdraws it",
        examples=[samples.FEEDBACK_ID],
    )
    prompt: str = Field(description="the run's prompt", examples=[samples.PROMPT])
    proposal: dict[str, Any] = Field(
        description="the corrected proposal", examples=[samples.CORRECTED]
    )


class Examples(BaseModel):
    """A page of the few-shot examples in use, oldest first."""

    items: list[ExampleInUse] = Field(
        description="the examples of this page",
        examples=[
            [
                {
                    "transaction_id": samples.TRANSACTION_ID,
                    "feedback_id": samples.FEEDBACK_ID,
                    "prompt": samples.PROMPT,
                    "proposal": samples.CORRECTED,
                }
            ]
        ],
    )
    next: str | None = Field(
        description="the value of `before` for the next page; null on the last page",
        examples=[samples.FEEDBACK_ID],
    )
