"""Profiling: the latest profiled request as a page."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Final

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse

from llm_sidecar.input_model import Text
from osiris.endpoint import endpoint

router = APIRouter(tags=["operations"])
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page contains everything it needs, and a browser loads nothing else."""


@endpoint(
    router,
    "GET",
    "/debug/prof",
    404,
    422,
    content={"text/html": {"schema": {"type": "string", "description": "an HTML page"}}},
    response_class=HTMLResponse,
    response_description="The page",
)
async def profile(
    request: Request,
    path: Annotated[
        Text | None,
        Query(description="the route's path; default: any route", examples=["/generate/phi3/"]),
    ] = None,
) -> HTMLResponse:
    """The profile of the latest request, or of the latest one of a route, as a page."""
    profiling = getattr(request.app.state, "profiles", None)
    if profiling is None:
        raise HTTPException(404, "Profiling is off; ENABLE_PROFILING=true turns it on.")
    latest = profiling.latest(path)
    if latest is None:
        raise HTTPException(404, "No such request has been profiled yet.")
    # Rendering takes long enough to delay other requests.
    nonce = secrets.token_urlsafe(16)
    page = await asyncio.to_thread(latest.page, nonce)
    policy = _CONTENT_SECURITY_POLICY.format(nonce=nonce)
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})
