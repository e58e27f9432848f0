"""The stream of events, and dead letters."""

from __future__ import annotations

from pydantic import BaseModel, Field

from osiris.schemas import samples


class StreamEvent(BaseModel):
    """One event of `/events/`."""

    id: str | None = Field(
        None,
        description="the id of the stream entry, for `Last-Event-ID`; absent for a `gap`",
        examples=[samples.ENTRY_ID],
    )
    event: str = Field(
        description="the type of the event, or `gap`: events may be missing",
        examples=["phi3.proposal.created", "gap"],
    )
    data: str = Field(
        description="the data of the event as JSON text; of a `gap`, an object with `from` (the id "
        "after which events may be missing) and `to` (the id at which the stream goes on; if it is "
        "before `from`, the stream has begun anew)",
        examples=['{"ticker": "AAPL", ...}', f'{{"from": "1-0", "to": "{samples.ENTRY_ID}"}}'],
    )
