"""The stream of events, and dead letters."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field

from osiris.schemas import samples

_FIELDS: Final = {
    "id": "a1b2",
    "type": "phi3.feedback.submitted",
    "data": '{"transaction_id": "", "feedback_type": "rating", "feedback_content": "5"}',
}


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
        "after which events may be missing) and `to` (the id at which the stream continues; if it "
        "is lower than `from`, the stream was created again)",
        examples=['{"ticker": "AAPL", ...}', f'{{"from": "1-0", "to": "{samples.ENTRY_ID}"}}'],
    )


class DeadLetterItem(BaseModel):
    """An entry of the inbox that could not be stored."""

    id: str = Field(
        description="the id of the dead letter, for requeueing it", examples=[samples.ENTRY_ID]
    )
    time: str = Field(
        description="when the sidecar gave up, in ISO 8601 and UTC",
        examples=["2026-01-31T10:00:00.123456+00:00"],
    )
    reason: str = Field(
        description="why it could not be stored", examples=["transaction_id: it is empty"]
    )
    entry: str = Field(
        description="the id that the entry had in the inbox", examples=["1769853500456-0"]
    )
    deliveries: int = Field(description="how often a sidecar received it", examples=[1])
    fields: dict[str, str] = Field(description="the fields of the entry", examples=[_FIELDS])


class DeadLetterPage(BaseModel):
    """A page of dead letters, newest first."""

    items: list[DeadLetterItem] = Field(
        description="the dead letters of this page; fewer than `limit` if they are long",
        examples=[
            [
                {
                    "id": samples.ENTRY_ID,
                    "time": "2026-01-31T10:00:00.123456+00:00",
                    "reason": "transaction_id: it is empty",
                    "entry": "1769853500456-0",
                    "deliveries": 1,
                    "fields": _FIELDS,
                }
            ]
        ],
    )
    next: str | None = Field(
        description="the value of `before` for the next page; null on the last page",
        examples=[samples.ENTRY_ID],
    )


class Requeued(BaseModel):
    """A dead letter that is in the inbox again."""

    message: str = Field(description="one sentence", examples=["The entry is in the inbox again."])
    id: str = Field(description="the one in the path", examples=[samples.ENTRY_ID])
    entry: str = Field(
        description="the new id of the entry in the inbox", examples=["1769853700789-0"]
    )
