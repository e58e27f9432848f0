"""Registration of a function as a route under `/v1`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import APIRouter

from osiris.endpoint import Endpoint, endpoint
from osiris.openai.schemas.errors import OpenAIError

GENERATION_ERRORS: Final = (404, 422, 429, 503, 504)
"""Error statuses of every path that uses a model."""


def openai_endpoint(
    router: APIRouter, method: str, path: str, *errors: int, **options: Any
) -> Callable[[Endpoint], Endpoint]:
    """`osiris.endpoint.endpoint` for a path whose errors are error objects.

    Args:
        errors: statuses that the function answers with; 422 becomes 400.
        options: see `endpoint`.
    """
    return endpoint(
        router,
        method,
        path,
        *errors,
        error_model=OpenAIError,
        bad_input_model=OpenAIError,
        **options,
    )


STREAM: Final[dict[str, Any]] = {
    "text/event-stream": {
        "example": 'data: {"id":"1","choices":[]}\r\n\r\ndata: [DONE]\r\n\r\n',
    }
}
"""OpenAPI's description of the stream that a path may answer with instead of JSON."""
