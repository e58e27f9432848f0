"""The adapter to use, and the adapter in use."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from osiris.schemas.base import RequestBody


class AdapterChoice(RequestBody):
    """Which adapter to use."""

    adapter: str | None = Field(
        default=None,
        pattern=r"^[0-9]{8}(-dpo)?$",
        description="the adapter's folder, `YYYYMMDD` or `YYYYMMDD-dpo`; default: the newest",
        examples=["20260131-dpo"],
    )


class AdapterSwapped(BaseModel):
    """The adapter in use."""

    status: Literal["ok"] = Field(
        description="`ok`: the adapter is in use for every request from now on", examples=["ok"]
    )
    phi3_adapter_date: str | None = Field(
        description="the date of the adapter in use, `YYYY-MM-DD`; null without one",
        examples=["2026-01-31"],
    )
