"""The body of an error under `/v1`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from osiris.refusals import OpenAIErrorType


class ErrorObject(BaseModel):
    """What is wrong."""

    message: str = Field(
        description="one sentence: what is wrong, and what to do",
        examples=["The phi3 queue is full; try again in 3 s."],
    )
    type: OpenAIErrorType = Field(
        description="`invalid_request_error`: another request may succeed; `rate_limit_exceeded` "
        "and `server_error`: the same request may succeed later",
        examples=["invalid_request_error"],
    )
    param: str | None = Field(
        description="the field that is wrong; null if it is not one field",
        examples=["messages[0].content"],
    )
    code: str | None = Field(
        description="the error as a code, for programs; null if there is none",
        examples=["missing_required_parameter"],
    )


class OpenAIError(BaseModel):
    """An error."""

    error: ErrorObject = Field(
        description="what is wrong",
        examples=[
            {
                "message": "messages: Field required",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "missing_required_parameter",
            }
        ],
    )
