"""The body of an error: `{"detail": …}`, and under `/v1` the error object of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from fastapi.responses import JSONResponse
from starlette.types import Scope

from osiris.paths import is_openai

OpenAIErrorType = Literal["invalid_request_error", "rate_limit_exceeded", "server_error"]
"""`type` in the error objects of the OpenAI API.

See https://platform.openai.com/docs/guides/error-codes and the error codes of
https://platform.openai.com/docs/api-reference/responses/object.
"""

_CODES: Final = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
"""The `code` of a status, where OpenAI has one."""


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error under `/v1`.

    Args:
        message: one sentence.
        status: of the HTTP answer; decides `type`.
        param: the field that is wrong, such as `messages[0].content`.
        code: for programs; default: that of the status.
    """
    return {
        "error": {
            "message": message,
            "type": openai_type(status),
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def openai_type(status: int) -> OpenAIErrorType:
    """`type` of an error with this status."""
    if status >= 500:
        return "server_error"
    return "rate_limit_exceeded" if status == 429 else "invalid_request_error"


def refusal(
    scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer to a request that a middleware refuses, in the form of its path."""
    body = error_body(detail, status) if is_openai(scope) else {"detail": detail}
    return JSONResponse(body, status, headers=headers)
