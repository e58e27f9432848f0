"""Generation: proposals from Phi-3, text from Hermes, and both in one request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.proposals import Proposal, Proposed
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.proposal_run import AssessedProposal
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar, check_length
from osiris.disconnects import cancel_on_disconnect
from osiris.endpoint import endpoint
from osiris.idempotency import REPLAYED, IdempotencyKey, answered_once
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
    MODEL_ID,
    GeneratedText,
    GenerateRequest,
    ModelId,
    PromptRequest,
    ProposalRequest,
    TradeAdjustment,
)
from osiris.streams import completed, result_of

router = APIRouter(tags=["generation"])
_ERRORS = (422, 429, 503, 504)


@endpoint(
    router,
    "POST",
    "/generate/",
    *_ERRORS,
    headers=(*GENERATION, "X-Grounded", REPLAYED),
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

    async def answer(attempt: Attempt) -> Response:
        chat = sidecar.chat.answer(body.prompt, body.max_length, attempt.deadline)
        completion = await completed(chat)
        text = {"generated_text": completion.text}
        return JSONResponse(text, headers=generation_headers(completion))

    return await _answered(request, sidecar, idempotency_key, answer)


@endpoint(
    router,
    "POST",
    "/generate/phi3/",
    *_ERRORS,
    headers=(*GENERATION, "X-Grounded", REPLAYED),
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

    async def answer(attempt: Attempt) -> Response:
        proposer = sidecar.proposer.generate(body.prompt, body.max_length, attempt.deadline)
        proposed = await result_of(proposer, Proposed)
        return JSONResponse(
            proposed.proposal,
            headers={**generation_headers(proposed.completion), "X-Grounded": proposed.grounded},
        )

    return await _answered(request, sidecar, idempotency_key, answer)


async def _answered(
    request: Request,
    sidecar: Sidecar,
    idempotency_key: str | None,
    answer: Callable[[Attempt], Awaitable[Response]],
) -> Response:
    """The response of `answer`, once for each key, unless the client disconnects."""
    answering = answered_once(request, idempotency_key, sidecar.idempotency, answer)
    return await cancel_on_disconnect(request, answering)


@endpoint(
    router,
    "POST",
    "/propose_trade_adjustments/",
    *_ERRORS,
    error_model=ProposalErrorBody,
    bad_input_model=ProposalBadInput,
    headers=(*GENERATION, "X-Grounded", "X-Hermes-Score", *RATING, "X-Stored", REPLAYED),
    error_headers=("X-Stored",),
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

    async def answer(attempt: Attempt) -> Response:
        running = sidecar.orchestrator.propose(body.prompt, body.max_length, author, attempt)
        return _assessed(await result_of(running, AssessedProposal))

    return await _answered(request, sidecar, idempotency_key, answer)


def _assessed(result: AssessedProposal) -> JSONResponse:
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
