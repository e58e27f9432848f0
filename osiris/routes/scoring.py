"""Scoring: Hermes' score of a proposal."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.services.idempotency import Attempt
from osiris.dependencies import CurrentSidecar, check_length
from osiris.disconnects import cancel_on_disconnect
from osiris.endpoint import endpoint
from osiris.idempotency import REPLAYED, IdempotencyKey, answered_once
from osiris.response_headers import RATING, rating_headers, stored_header
from osiris.schemas.scoring import Score, ScoreRequest

router = APIRouter(tags=["scoring"])


@endpoint(
    router,
    "POST",
    "/score/hermes/",
    422,
    429,
    503,
    504,
    headers=(*RATING, "X-Stored", REPLAYED),
    response_model=Score,
    response_description="The score",
)
async def score_hermes(
    body: ScoreRequest,
    request: Request,
    sidecar: CurrentSidecar,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Scores a proposal from 0 to 1 and stores the score.

    `X-Hermes-Score-Reliable: false` means that the score means little, and `X-Stored: false` that
    it could not be stored.
    """
    check_length(sidecar, body)

    async def answer(attempt: Attempt) -> Response:
        result = await sidecar.judge.score(body.proposal, body.context, attempt)
        score = Score(proposal_id=result.proposal_id, score=result.rating.score)
        headers = {**rating_headers(result.rating), **stored_header(result.stored)}
        return JSONResponse(score.model_dump(mode="json"), headers=headers)

    answering = answered_once(request, idempotency_key, sidecar.idempotency, answer)
    return await cancel_on_disconnect(request, answering)
