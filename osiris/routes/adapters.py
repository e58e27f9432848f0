"""Operations: adapters."""

from __future__ import annotations

from fastapi import APIRouter

from osiris.http import CurrentSidecar, endpoint
from osiris.schemas import AdapterSwapped

router = APIRouter(tags=["operations"])


@endpoint(router, "POST", "/adapters/swap", 409, 503)
async def swap_adapters(sidecar: CurrentSidecar) -> AdapterSwapped:
    """Takes the newest adapter into use; requests that run keep the one they began with."""
    date = await sidecar.swap_adapter()
    return AdapterSwapped(status="ok", phi3_adapter_date=None if date is None else date.isoformat())
