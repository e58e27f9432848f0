"""The adapter in use."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from llm_sidecar.services.idempotency import Attempt
from osiris.dependencies import CurrentSidecar
from osiris.endpoint import endpoint
from osiris.idempotency import REPLAYED, IdempotencyKey, answered_once
from osiris.schemas.adapters import AdapterChoice, AdapterSwapped

router = APIRouter(tags=["operations"])


@endpoint(
    router,
    "POST",
    "/adapters/swap",
    409,
    422,
    503,
    504,
    headers=(REPLAYED,),
    response_model=AdapterSwapped,
    response_description="The adapter is in use",
)
async def swap_adapters(
    request: Request,
    sidecar: CurrentSidecar,
    requested: AdapterChoice | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Switches Phi-3 to the newest adapter, or to the named one.

    Running requests keep the adapter that they began with.
    """

    # A retry with a key must not undo a swap that another client has made in between.
    async def answer(_: Attempt) -> Response:
        date = await sidecar.adapters.swap(None if requested is None else requested.adapter)
        swapped = AdapterSwapped(
            status="ok", phi3_adapter_date=None if date is None else date.isoformat()
        )
        return JSONResponse(swapped.model_dump())

    return await answered_once(request, idempotency_key, sidecar.idempotency, answer)
