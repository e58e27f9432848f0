"""The bodies of errors."""

from __future__ import annotations

import uuid

from pydantic import BaseModel, Field

from llm_sidecar.proposals import MIN_COMPLETION_TOKENS
from osiris.schemas import samples


class ErrorBody(BaseModel):
    """An error."""

    detail: str = Field(
        description="one sentence: what is wrong, and what to do",
        examples=["The phi3 queue is full; try again in 3 s."],
    )


class FieldError(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int] = Field(
        description="where the field is: `body`, `query`, `path` or `header`, then names and "
        "indexes; `*` stands for a name that is in no schema",
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
            f"max_length: a proposal needs {MIN_COMPLETION_TOKENS} tokens; send at least that",
        ],
    )


class ProposalErrorBody(ErrorBody):
    """An error, and the id of a proposal that was stored before it."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the id of the stored proposal; absent if none is stored",
        examples=[samples.TRANSACTION_ID],
    )


class ProposalBadInput(BadInput):
    """Bad input, and the id of a proposal that was stored before the error."""

    transaction_id: uuid.UUID | None = Field(
        None,
        description="the id of the stored proposal; absent if none is stored",
        examples=[samples.TRANSACTION_ID],
    )
