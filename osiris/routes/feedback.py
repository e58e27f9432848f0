"""Feedback on proposals, for tuning and for few-shot examples."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import StringConstraints, ValidationError
from starlette.convertors import Convertor, register_url_convertor

from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.input_model import DOCUMENTED_AS_TEXT, IS_TEXT
from llm_sidecar.proposals import Proposal
from llm_sidecar.services.example_rules import (
    EXAMPLE_PROMPT_CHARS,
    MAX_PROPOSAL_CHARS,
    MAX_TOKENS,
    Outcome,
)
from llm_sidecar.services.idempotency import Attempt
from osiris.dependencies import CurrentSidecar, check_length
from osiris.endpoint import endpoint
from osiris.idempotency import REPLAYED, IdempotencyKey, answered_once
from osiris.middleware.access import Author
from osiris.schemas.feedback import FeedbackRequest, FeedbackStored, FeedbackWithdrawn

router = APIRouter(tags=["feedback"])

# The length is checked first, so that its error counts characters.
FeedbackId = Annotated[
    str, StringConstraints(min_length=1, max_length=128), IS_TEXT, DOCUMENTED_AS_TEXT
]

_NO_EXAMPLE: Final = "the corrected proposal is not an example, because"
_MESSAGES: Final = {
    Outcome.EXAMPLE: "the corrected proposal is an example for the next ones.",
    Outcome.PROPOSAL_TOO_LONG: f"{_NO_EXAMPLE} it takes more than {MAX_PROPOSAL_CHARS} characters "
    "as JSON.",
    Outcome.OFF: f"{_NO_EXAMPLE} few-shot examples are off; FEW_SHOT_EXAMPLES turns them on.",
    Outcome.DATABASE_AWAY: "until the database is back, it is not known whether the corrected "
    "proposal is an example.",
    Outcome.NO_RUN: f"{_NO_EXAMPLE} no run with this transaction_id is stored.",
    Outcome.PROMPT_NOT_TEXT: f"{_NO_EXAMPLE} the prompt of its run has control characters.",
    Outcome.PROMPT_TOO_LONG: f"{_NO_EXAMPLE} the prompt of its run has more than "
    f"{EXAMPLE_PROMPT_CHARS} characters.",
    Outcome.TOO_MANY_TOKENS: f"{_NO_EXAMPLE} it and the prompt of its run may take more than "
    f"{MAX_TOKENS} tokens, or more than half of the model's context (each byte counts as one "
    "token).",
    Outcome.WITHDRAWN: f"{_NO_EXAMPLE} this feedback was withdrawn.",
    Outcome.REPLACED: f"{_NO_EXAMPLE} a newer correction of the same run is one.",
    Outcome.CROWDED_OUT: f"{_NO_EXAMPLE} newer ones leave no space for it.",
}


@endpoint(
    router,
    "POST",
    "/feedback/phi3/",
    422,
    503,
    504,
    headers=("X-Feedback-ID", REPLAYED),
    response_model=FeedbackStored,
    response_description="The feedback is durable",
)
async def submit_feedback(
    body: FeedbackRequest,
    request: Request,
    sidecar: CurrentSidecar,
    author: Author,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Stores feedback and answers once the row is durable; `X-Feedback-ID` is its id.

    The name of the request's API key is stored with it as `author`. If the client disconnects, the
    feedback is still stored.
    """
    check_length(sidecar, body)
    try:
        row = Phi3FeedbackSchema(**body.model_dump(exclude_none=True))
    except ValidationError as error:
        # Not pydantic's own text, which quotes the input.
        reasons = (f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors())
        raise InvalidRequest("; ".join(reasons)) from None

    async def answer(attempt: Attempt) -> Response:
        feedback_id, outcome = await sidecar.feedback.submit(row, author, attempt)
        stored = FeedbackStored(
            message=_message(outcome, body.corrected_proposal), transaction_id=body.transaction_id
        )
        return JSONResponse(stored.model_dump(), headers={"X-Feedback-ID": feedback_id})

    return await answered_once(
        request, idempotency_key, sidecar.idempotency, answer, refuse_unkept=True
    )


def _message(outcome: Outcome, corrected: object) -> str:
    if outcome is Outcome.NO_CORRECTION:
        return "Feedback stored."
    if outcome is Outcome.INVALID:
        fields = ", ".join(_bad_fields(corrected))
        return (
            f"Feedback stored; corrected_proposal is not a valid proposal ({fields}), so it is not "
            "an example."
        )
    return f"Feedback stored; {_MESSAGES[outcome]}"


def _bad_fields(corrected: object) -> list[str]:
    """The fields that are not valid, sorted; `*` stands for each key that no proposal has."""
    try:
        Proposal.model_validate(corrected)
    except ValidationError as error:
        names = {str(entry["loc"][0]) for entry in error.errors()}
        return sorted({name if name in Proposal.model_fields else "*" for name in names})
    return []


class _AnyText(Convertor[str]):
    """The rest of a path. The feedback_id of another service may contain slashes and newlines, and
    Starlette's `path` stops at newlines."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any_text", _AnyText())


# If the id ends in a slash, the path needs one more slash.
@endpoint(
    router,
    "DELETE",
    "/feedback/{feedback_id:any_text}",
    404,
    422,
    503,
    response_description="The feedback is withdrawn",
)
async def withdraw_feedback(
    feedback_id: Annotated[
        FeedbackId,
        Path(description="the value of `X-Feedback-ID`", examples=["9f2c1d64a7d0"]),
    ],
    sidecar: CurrentSidecar,
) -> FeedbackWithdrawn:
    """Withdraws feedback: it is neither a few-shot example nor training data from then on.

    Nothing is deleted. You can withdraw the same feedback twice.
    """
    await sidecar.feedback.withdraw(feedback_id)
    return FeedbackWithdrawn(message="Feedback withdrawn.", feedback_id=feedback_id)
