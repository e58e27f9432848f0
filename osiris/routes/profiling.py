"""Profiling: the latest profiled request as a page."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse

from llm_sidecar.input_model import Text
from osiris.http import endpoint

router = APIRouter(tags=["operations"])
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Everything the page needs is in it; a browser refuses the rest."""
_HEADERS: Final = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "Cache-Control": "no-store"}


@endpoint(router, "GET", "/debug/prof", 404, response_class=HTMLResponse)
async def profile(request: Request, path: Text | None = None) -> HTMLResponse:
    """The profile of the latest request, or of the latest one of a route.

    `path` is the route's, such as `/generate/phi3/`.
    """
    profiling = getattr(request.app.state, "profiles", None)
    if profiling is None:
        raise HTTPException(404, "Profiling is off; ENABLE_PROFILING=true turns it on.")
    latest = profiling.latest(path)
    if latest is None:
        raise HTTPException(404, "No such request has been profiled yet.")
    # Making the page takes long enough for others to notice.
    page = await asyncio.to_thread(latest.page)
    return HTMLResponse(page, headers=_HEADERS)
