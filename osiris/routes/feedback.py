"""Feedback: what people say of proposals, kept for tuning and for the next prompt."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Path, Response
from pydantic import ValidationError
from starlette.convertors import Convertor, register_url_convertor

from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.examples import MAX_PROMPT_CHARS, MAX_PROPOSAL_CHARS, MAX_TOKENS, Outcome
from llm_sidecar.input_model import Text
from llm_sidecar.proposals import Proposal
from osiris.http import CurrentSidecar, check_length, endpoint
from osiris.schemas import FeedbackRequest, FeedbackStored, FeedbackWithdrawn

router = APIRouter(tags=["feedback"])

_MESSAGES: Final = {
    Outcome.EXAMPLE: "the corrected proposal is an example for the next ones.",
    Outcome.PROPOSAL_TOO_LONG: "the corrected proposal is no example, as it takes more than "
    f"{MAX_PROPOSAL_CHARS} characters as JSON.",
    Outcome.OFF: "the corrected proposal is no example, as FEW_SHOT_EXAMPLES is 0.",
    Outcome.DATABASE_AWAY: "whether the corrected proposal is an example is not known before the "
    "database is back.",
    Outcome.NO_RUN: "the corrected proposal is no example, as no run with this transaction_id is "
    "stored.",
    Outcome.PROMPT_NOT_TEXT: "the corrected proposal is no example, as the prompt of its run has "
    "control characters.",
    Outcome.PROMPT_TOO_LONG: "the corrected proposal is no example, as the prompt of its run has "
    f"more than {MAX_PROMPT_CHARS} characters.",
    Outcome.TOO_MANY_TOKENS: "the corrected proposal is no example, as it and the prompt of its "
    f"run may take more than {MAX_TOKENS} tokens, or more than half of the model's context "
    "(counted as one token a byte).",
    Outcome.WITHDRAWN: "the corrected proposal is no example, as this feedback was withdrawn.",
    Outcome.REPLACED: "the corrected proposal is no example, as a newer correction of the same run "
    "is one.",
    Outcome.CROWDED_OUT: "the corrected proposal is no example, as newer ones take all the room.",
}


@endpoint(router, "POST", "/feedback/phi3/", 413, 422, 503)
async def submit_feedback(
    body: FeedbackRequest, sidecar: CurrentSidecar, response: Response
) -> FeedbackStored:
    """Stores feedback and answers once the row is durable; `X-Feedback-ID` is its id.

    A client that hangs up meanwhile does not undo it, so nothing races the disconnect here.
    """
    check_length(sidecar, body)
    try:
        row = Phi3FeedbackSchema(**body.model_dump(exclude_none=True))
    except ValidationError as error:
        # Without the input, which pydantic's own text would quote.
        reasons = (f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors())
        raise InvalidRequest("; ".join(reasons)) from None
    feedback_id, outcome = await sidecar.submit_feedback(row)
    response.headers["X-Feedback-ID"] = feedback_id
    return FeedbackStored(
        message=_message(outcome, body.corrected_proposal), transaction_id=body.transaction_id
    )


def _message(outcome: Outcome, corrected: object) -> str:
    if outcome is Outcome.NO_CORRECTION:
        return "Feedback stored."
    if outcome is Outcome.INVALID:
        fields = ", ".join(_bad_fields(corrected))
        return (
            f"Feedback stored; corrected_proposal is no valid proposal ({fields}), so no example."
        )
    return f"Feedback stored; {_MESSAGES[outcome]}"


def _bad_fields(corrected: object) -> list[str]:
    """The fields that make it no proposal; `*` is a key that no proposal has."""
    try:
        Proposal.model_validate(corrected)
    except ValidationError as error:
        names = {str(entry["loc"][0]) for entry in error.errors()}
        return sorted({name if name in Proposal.model_fields else "*" for name in names})
    return []


class _AnyText(Convertor[str]):
    """The rest of a path, in which another service's feedback_id may have slashes, and newlines, at
    which Starlette's `path` stops."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any_text", _AnyText())


# Where the id ends in a slash, the path needs the slash of its own as well.
@endpoint(router, "DELETE", "/feedback/{feedback_id:any_text}/", 404, 422, 503)
async def withdraw_feedback(
    feedback_id: Annotated[Text, Path(min_length=1, max_length=128)], sidecar: CurrentSidecar
) -> FeedbackWithdrawn:
    """Withdraws feedback: it is no few-shot example and no training data any more.

    Nothing is removed; withdrawing again changes nothing.
    """
    await sidecar.withdraw_feedback(feedback_id)
    return FeedbackWithdrawn(message="Feedback withdrawn.", feedback_id=feedback_id)
