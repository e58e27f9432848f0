"""Feedback: what people say of proposals, kept for tuning and for the next prompt."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import ValidationError

from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.proposals import Proposal
from osiris.http import CurrentSidecar, check_length, endpoint
from osiris.schemas import FeedbackRequest, FeedbackStored

router = APIRouter(tags=["feedback"])


@endpoint(router, "POST", "/feedback/phi3/", 413, 422, 503)
async def submit_feedback(body: FeedbackRequest, sidecar: CurrentSidecar) -> FeedbackStored:
    """Stores feedback and answers once the row is durable.

    A client that hangs up meanwhile does not undo it, so nothing races the disconnect here.
    """
    check_length(sidecar, body)
    try:
        row = Phi3FeedbackSchema(**body.model_dump(exclude_none=True))
    except ValidationError as error:
        # Without the input, which pydantic's own text would quote.
        reasons = (f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors())
        raise InvalidRequest("; ".join(reasons)) from None
    is_example = await sidecar.submit_feedback(row)
    return FeedbackStored(
        message=_message(body.corrected_proposal, is_example), transaction_id=body.transaction_id
    )


def _message(corrected: dict[str, object] | None, is_example: bool | None) -> str:
    if corrected is None or is_example is None:
        return "Feedback stored."
    if is_example:
        return "Feedback stored; the corrected proposal is an example for the next ones."
    try:
        Proposal.model_validate(corrected)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, e["loc"])) for e in error.errors()}))
        return (
            f"Feedback stored; corrected_proposal is no valid proposal ({fields}), so no example."
        )
    return (
        "Feedback stored; the corrected proposal is no example, as there is no run of this "
        "transaction_id whose prompt is short enough."
    )
