"""A proposal to score, and its score."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import BaseModel, Field

from osiris.schemas import samples
from osiris.schemas.base import RequestBody


class ScoreRequest(RequestBody):
    """A proposal to score."""

    proposal: dict[str, Any] = Field(
        min_length=1,
        description="the proposal, with any keys; its `id`, if that is a UUID, becomes the "
        "`proposal_id`",
        examples=[samples.PROPOSAL],
    )
    context: str | None = Field(
        None,
        description="the market context that the proposal is judged against; optional",
        examples=[samples.PROMPT],
    )


class Score(BaseModel):
    """A score and its id."""

    proposal_id: uuid.UUID = Field(
        description="the proposal's own `id` if that is a UUID, otherwise a new one",
        examples=[samples.TRANSACTION_ID],
    )
    score: float = Field(
        ge=0,
        le=1,
        description="how good Hermes thinks the proposal is: 0 is worst, 1 is best",
        examples=[0.75],
    )
