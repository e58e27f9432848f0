"""Scoring: Hermes' opinion of a proposal as a number."""

from __future__ import annotations

from fastapi import APIRouter, Request

from osiris.http import CurrentSidecar, check_length, endpoint, unless_gone
from osiris.schemas import Score, ScoreRequest

router = APIRouter(tags=["scoring"])


@endpoint(router, "POST", "/score/hermes/", 413, 422, 429, 503, 504)
async def score_hermes(body: ScoreRequest, request: Request, sidecar: CurrentSidecar) -> Score:
    """Scores a proposal from 0 to 1 and stores the score."""
    check_length(sidecar, body)
    proposal_id, score = await unless_gone(request, sidecar.score(body.proposal, body.context))
    return Score(proposal_id=proposal_id, score=score)
