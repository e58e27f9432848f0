"""Generation: proposals from Phi-3, text from Hermes, and both in one request."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.proposals import Proposal, Proposed
from llm_sidecar.services.proposal_run import AssessedProposal
from llm_sidecar.sidecar import Sidecar
from osiris.dependencies import CurrentSidecar, check_length
from osiris.disconnects import cancel_on_disconnect
from osiris.endpoint import endpoint
from osiris.middleware.access import Author
from osiris.response_headers import GENERATION, generation_headers, stored_header
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
    headers=(*GENERATION, "X-Grounded"),
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
) -> JSONResponse:
    """Generates with the model that the body or the query names; the default is Hermes.

    Only a proposal has `X-Grounded`.
    """
    if model_id and body.model_id and model_id != body.model_id:
        raise InvalidRequest("model_id: the body and the query name different models; send one")
    if "phi3" in (model_id, body.model_id):
        return await _propose(body, request, sidecar)
    return await generate_hermes(body, request, sidecar)


@endpoint(
    router,
    "POST",
    "/generate/hermes/",
    *_ERRORS,
    headers=GENERATION,
    response_model=GeneratedText,
    response_description="The text",
)
async def generate_hermes(
    body: PromptRequest, request: Request, sidecar: CurrentSidecar
) -> JSONResponse:
    """Hermes' answer to a free-text prompt.

    At the deadline it returns the text so far, with `X-Finish-Reason: deadline`, or 504 if there
    is none.
    """
    check_length(sidecar, body)
    answering = completed(sidecar.chat.answer(body.prompt, body.max_length))
    completion = await cancel_on_disconnect(request, answering)
    return JSONResponse({"generated_text": completion.text}, headers=generation_headers(completion))


@endpoint(
    router,
    "POST",
    "/generate/phi3/",
    *_ERRORS,
    headers=(*GENERATION, "X-Grounded"),
    response_model=Proposal,
    response_description="The proposal",
)
async def generate_phi3(
    body: ProposalRequest, request: Request, sidecar: CurrentSidecar
) -> JSONResponse:
    """A valid trade proposal, which is neither assessed nor stored.

    `X-Grounded` is `true`, or the fields whose ticker or numbers are not in the prompt.
    """
    return await _propose(body, request, sidecar)


async def _propose(body: PromptRequest, request: Request, sidecar: Sidecar) -> JSONResponse:
    check_length(sidecar, body)
    proposing = result_of(sidecar.proposer.generate(body.prompt, body.max_length), Proposed)
    proposed = await cancel_on_disconnect(request, proposing)
    return JSONResponse(
        proposed.proposal,
        headers={**generation_headers(proposed.completion), "X-Grounded": proposed.grounded},
    )


@endpoint(
    router,
    "POST",
    "/propose_trade_adjustments/",
    *_ERRORS,
    error_model=ProposalErrorBody,
    bad_input_model=ProposalBadInput,
    headers=(*GENERATION, "X-Grounded", "X-Hermes-Score", "X-Stored"),
    error_headers=("X-Stored",),
    response_model=TradeAdjustment,
    response_description="The proposal and its assessment",
)
async def propose_trade_adjustments(
    body: ProposalRequest, request: Request, sidecar: CurrentSidecar, author: Author
) -> JSONResponse:
    """A trade proposal with Hermes' critique, stored and published on the event bus.

    The generation headers are those of the proposal; `X-Hermes-Score` is Hermes' score, and
    `X-Grounded` is `true`, or the fields whose ticker or numbers are not in the prompt. If Hermes
    fails, the proposal is stored, and the error's body has its `transaction_id`.
    `X-Stored: false` means that a row could not be stored.
    """
    check_length(sidecar, body)
    running = sidecar.orchestrator.propose(body.prompt, body.max_length, author)
    result = await cancel_on_disconnect(request, result_of(running, AssessedProposal))
    return JSONResponse(
        {
            "transaction_id": str(result.transaction_id),
            "phi3_proposal": result.proposal,
            "hermes_assessment": result.assessment.text,
        },
        headers={
            **generation_headers(result.completion),
            "X-Grounded": result.grounded,
            "X-Hermes-Score": f"{result.score:.6f}",
            **stored_header(result.stored),
        },
    )
