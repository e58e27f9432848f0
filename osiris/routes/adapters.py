"""The adapter in use."""

from __future__ import annotations

from fastapi import APIRouter

from osiris.dependencies import CurrentSidecar
from osiris.endpoint import endpoint
from osiris.schemas.adapters import AdapterChoice, AdapterSwapped

router = APIRouter(tags=["operations"])


@endpoint(
    router,
    "POST",
    "/adapters/swap",
    409,
    422,
    503,
    response_description="The adapter is in use",
)
async def swap_adapters(
    sidecar: CurrentSidecar, requested: AdapterChoice | None = None
) -> AdapterSwapped:
    """Switches Phi-3 to the newest adapter, or to the named one.

    Running requests keep the adapter that they began with.
    """
    date = await sidecar.adapters.swap(None if requested is None else requested.adapter)
    return AdapterSwapped(status="ok", phi3_adapter_date=None if date is None else date.isoformat())
