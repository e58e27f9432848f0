"""Dependencies of the routes: the sidecar, and checks that FastAPI lacks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from llm_sidecar import input_model
from llm_sidecar.input_model import InputModel, QueryInteger
from llm_sidecar.sidecar import Sidecar


async def current_sidecar(request: Request) -> Sidecar:
    """The sidecar of the app that serves the request.

    A coroutine, because FastAPI calls other functions in a thread, which takes longer than a probe.
    """
    sidecar: Sidecar = request.app.state.sidecar
    return sidecar


CurrentSidecar = Annotated[Sidecar, Depends(current_sidecar)]
PageLimit = Annotated[
    QueryInteger,
    Query(
        ge=1,
        le=500,
        description="the maximum number of items on the page",
        # The schema of `QueryInteger` drops the bounds.
        json_schema_extra={"minimum": 1, "maximum": 500},
        examples=[100],
    ),
]
"""The query parameter `limit` of a list."""


def check_length(sidecar: Sidecar, body: InputModel) -> None:
    """Refuses a body in which a text, or an object as JSON, is longer than MAX_PROMPT_CHARS.

    Raises:
        RequestValidationError: names each field that is too long.
    """
    try:
        input_model.check_length(body, sidecar.settings.limits.max_prompt_chars)
    except ValidationError as error:
        errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
        raise RequestValidationError(errors) from None
