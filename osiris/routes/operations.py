"""Operations: health, probes and adapters."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from osiris.http import CurrentSidecar, current_sidecar, endpoint
from osiris.schemas import AdapterSwapped, Health, Probe

router = APIRouter(tags=["operations"])
_JSON: Final = "application/json"


@endpoint(router, "GET", "/health", response_model=Health)
async def health(request: Request) -> Response:
    """The state of the whole and of each part; always 200."""
    # Past dependencies and the model's checks, which would take longer than all the rest.
    return Response(to_json((await current_sidecar(request)).health()), media_type=_JSON)


@endpoint(router, "GET", "/health/live")
async def live() -> Probe:
    """Whether the process serves requests at all."""
    return Probe(status="ok")


@endpoint(router, "GET", "/health/ready", 503, error_model=Probe)
async def ready(request: Request, sidecar: CurrentSidecar, response: Response) -> Probe:
    """Whether every part that an answer needs is there; `draining` once the server is to end."""
    if request.app.state.shutdown.draining:
        response.status_code = 503
        return Probe(status="draining")
    missing = sidecar.missing()
    response.status_code = 503 if missing else 200
    return Probe(status="unavailable" if missing else "ok", missing=missing)


@endpoint(router, "POST", "/adapters/swap", 409, 503)
async def swap_adapters(sidecar: CurrentSidecar) -> AdapterSwapped:
    """Takes the newest adapter into use; requests that run keep the one they began with."""
    date = await sidecar.swap_adapter()
    return AdapterSwapped(status="ok", phi3_adapter_date=None if date is None else date.isoformat())
