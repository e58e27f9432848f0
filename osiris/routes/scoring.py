"""Scoring: Hermes' score of a proposal."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from osiris.dependencies import CurrentSidecar, check_length
from osiris.disconnects import cancel_on_disconnect
from osiris.endpoint import endpoint
from osiris.response_headers import stored_header
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
    headers=("X-Stored",),
    response_description="The score",
)
async def score_hermes(
    body: ScoreRequest, request: Request, response: Response, sidecar: CurrentSidecar
) -> Score:
    """Scores a proposal from 0 to 1 and stores the score.

    `X-Stored: false` means that it could not be stored.
    """
    check_length(sidecar, body)
    result = await cancel_on_disconnect(request, sidecar.judge.score(body.proposal, body.context))
    response.headers.update(stored_header(result.stored))
    return Score(proposal_id=result.proposal_id, score=result.score)
