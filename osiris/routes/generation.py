"""Generation: proposals from Phi-3, text from Hermes, and both in one request."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.models.base import Completion
from llm_sidecar.proposals import Proposal, Proposed
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.proposal_run import AssessedProposal
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar, check_length
from osiris.endpoint import endpoint
from osiris.event_stream import MEDIA_TYPE
from osiris.generation_stream import Generation, answered
from osiris.idempotency import REPLAYED, IdempotencyKey
from osiris.middleware.access import Author
from osiris.response_headers import (
    GENERATION,
    RATING,
    generation_headers,
    rating_headers,
    stored_header,
)
from osiris.schemas.errors import ProposalBadInput, ProposalErrorBody
from osiris.schemas.generation import (
    EVENTS,
    MODEL_ID,
    GeneratedText,
    GenerateRequest,
    ModelId,
    PromptRequest,
    ProposalRequest,
    TradeAdjustment,
)
from osiris.streams import with_completion

router = APIRouter(tags=["generation"])
_ERRORS: Final = (422, 429, 503, 504)
_EVENTS: Final = {MEDIA_TYPE: {"schema": EVENTS}}


@endpoint(
    router,
    "POST",
    "/generate/",
    *_ERRORS,
    headers=(*GENERATION, "X-Grounded", REPLAYED),
    content=_EVENTS,
    response_model=GeneratedText | Proposal,
    response_description="Hermes' text, or Phi-3's proposal",
)
async def generate(
    body: GenerateRequest,
    request: Request,
    sidecar: CurrentSidecar,
    model_id: Annotated[
        ModelId | None, Query(description=f"{MODEL_ID} here or in the body", examples=["phi3"])
    ] = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generates with the model that the body or the query names; the default is Hermes.

    Only a proposal has `X-Grounded`.
    """
    if model_id and body.model_id and model_id != body.model_id:
        raise InvalidRequest("model_id: the body and the query name different models; send one")
    if "phi3" in (model_id, body.model_id):
        return await _proposed(body, request, sidecar, idempotency_key)
    return await generate_hermes(body, request, sidecar, idempotency_key)


@endpoint(
    router,
    "POST",
    "/generate/hermes/",
    *_ERRORS,
    headers=(*GENERATION, REPLAYED),
    content=_EVENTS,
    response_model=GeneratedText,
    response_description="The text",
)
async def generate_hermes(
    body: PromptRequest,
    request: Request,
    sidecar: CurrentSidecar,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Hermes' answer to a free-text prompt.

    At the deadline it returns the text so far, with `X-Finish-Reason: deadline`, or 504 if there
    is none.
    """
    check_length(sidecar, body)

    def run(attempt: Attempt) -> AsyncGenerator[object, None]:
        chat = sidecar.chat.answer(body.prompt, body.max_length, attempt.deadline)
        return with_completion(chat)

    generation = Generation("hermes", run, Completion, _text)
    return await answered(request, idempotency_key, sidecar.idempotency, generation)


def _text(completion: Completion) -> Response:
    text = {"generated_text": completion.text}
    return JSONResponse(text, headers=generation_headers(completion))


@endpoint(
    router,
    "POST",
    "/generate/phi3/",
    *_ERRORS,
    headers=(*GENERATION, "X-Grounded", REPLAYED),
    content=_EVENTS,
    response_model=Proposal,
    response_description="The proposal",
)
async def generate_phi3(
    body: ProposalRequest,
    request: Request,
    sidecar: CurrentSidecar,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """A valid trade proposal, which is neither assessed nor stored.

    `X-Grounded` is `true`, or the fields whose ticker or numbers are not in the prompt.
    """
    return await _proposed(body, request, sidecar, idempotency_key)


async def _proposed(
    body: PromptRequest, request: Request, sidecar: Sidecar, idempotency_key: str | None
) -> Response:
    check_length(sidecar, body)

    def run(attempt: Attempt) -> AsyncGenerator[object, None]:
        return sidecar.proposer.generate(body.prompt, body.max_length, attempt.deadline)

    generation = Generation("phi3", run, Proposed, _proposal)
    return await answered(request, idempotency_key, sidecar.idempotency, generation)


def _proposal(proposed: Proposed) -> Response:
    headers = {**generation_headers(proposed.completion), "X-Grounded": proposed.grounded}
    return JSONResponse(proposed.proposal, headers=headers)


@endpoint(
    router,
    "POST",
    "/propose_trade_adjustments/",
    *_ERRORS,
    error_model=ProposalErrorBody,
    bad_input_model=ProposalBadInput,
    headers=(*GENERATION, "X-Grounded", "X-Hermes-Score", *RATING, "X-Stored", REPLAYED),
    error_headers=("X-Stored",),
    content=_EVENTS,
    response_model=TradeAdjustment,
    response_description="The proposal and its assessment",
)
async def propose_trade_adjustments(
    body: ProposalRequest,
    request: Request,
    sidecar: CurrentSidecar,
    author: Author,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """A trade proposal with Hermes' critique, stored and published on the event bus.

    The generation headers are those of the proposal; `X-Hermes-Score` is Hermes' score, which means
    little if `X-Hermes-Score-Reliable` is `false`; `X-Grounded` is `true`, or the fields whose
    ticker or numbers are not in the prompt. If Hermes fails, the proposal is stored, and the
    error's body has its `transaction_id`. The same request with the same `Idempotency-Key`
    continues with the assessment of this proposal.
    `X-Stored: false` means that a row could not be stored.
    """
    check_length(sidecar, body)

    def run(attempt: Attempt) -> AsyncGenerator[object, None]:
        return sidecar.orchestrator.propose(body.prompt, body.max_length, author, attempt)

    generation = Generation("phi3", run, AssessedProposal, _assessed)
    return await answered(request, idempotency_key, sidecar.idempotency, generation)


def _assessed(result: AssessedProposal) -> Response:
    return JSONResponse(
        {
            "transaction_id": str(result.transaction_id),
            "phi3_proposal": result.proposal,
            "hermes_assessment": result.assessment.text,
        },
        headers={
            **generation_headers(result.completion),
            "X-Grounded": result.grounded,
            "X-Hermes-Score": f"{result.rating.score:.6f}",
            **rating_headers(result.rating),
            **stored_header(result.stored),
        },
    )
