"""Operations: adapters."""

from __future__ import annotations

from fastapi import APIRouter

from osiris.http import CurrentSidecar, endpoint
from osiris.schemas import AdapterChoice, AdapterSwapped

router = APIRouter(tags=["operations"])


@endpoint(router, "POST", "/adapters/swap", 409, 503)
async def swap_adapters(
    sidecar: CurrentSidecar, chosen: AdapterChoice | None = None
) -> AdapterSwapped:
    """Takes the newest adapter into use, or the one that is named; requests that run keep the one
    they began with."""
    date = await sidecar.swap_adapter(None if chosen is None else chosen.adapter)
    return AdapterSwapped(status="ok", phi3_adapter_date=None if date is None else date.isoformat())
