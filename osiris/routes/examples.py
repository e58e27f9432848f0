"""The few-shot examples in use."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.input_model import Text
from osiris.dependencies import CurrentSidecar, PageLimit
from osiris.endpoint import endpoint
from osiris.schemas.examples import ExampleInUse, Examples

router = APIRouter(tags=["feedback"])


@endpoint(router, "GET", "/examples/", 422, response_description="A page of examples")
async def list_examples(
    sidecar: CurrentSidecar,
    limit: PageLimit = 500,
    before: Annotated[
        Text | None,
        Query(
            description="`next` of the previous page; leave it out for the first page",
            examples=["9f2c1d64a7d0"],
        ),
    ] = None,
) -> Examples:
    """The few-shot examples in use, oldest first."""
    used = sidecar.few_shot.corrections
    ids = [correction.feedback_id for correction in used]
    if before is not None and before not in ids:
        raise InvalidRequest("before: no page ended there; leave it out for the first page.")
    start = 0 if before is None else ids.index(before) + 1
    page = used[start : start + limit]
    is_last = start + limit >= len(used)
    return Examples(
        items=[ExampleInUse.model_validate(correction._asdict()) for correction in page],
        next=None if is_last else page[-1].feedback_id,
    )
