"""The events of the bus as they happen, and the dead letters of its inbox."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from sse_starlette import EventSourceResponse, ServerSentEvent

from llm_sidecar.event_bus.followed_stream import EntryId, Gap
from llm_sidecar.input_model import Text
from llm_sidecar.services import dead_letters
from llm_sidecar.services.event_feed import Feed
from llm_sidecar.services.events import PAYLOADS
from llm_sidecar.services.idempotency import Attempt
from osiris.dependencies import CurrentSidecar, PageLimit
from osiris.endpoint import endpoint
from osiris.idempotency import REPLAYED, IdempotencyKey, answered_once
from osiris.schemas.events import DeadLetterItem, DeadLetterPage, Requeued

router = APIRouter(tags=["events"])

KEEP_ALIVE: Final = 15
"""Seconds between the comments that keep a silent stream open."""
_SHUTDOWN_GRACE: Final = 0.3
"""Seconds in which a stream can end by itself at shutdown, before it is cancelled."""

_EVENTS: Final = {
    "type": "string",
    "description": "Server-sent events, one for each event of the bus but `audio.bytes`. Comments "
    "keep the connection open.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"$ref": "#/components/schemas/StreamEvent"},
    "examples": [
        ': ping\r\n\r\nid: 1769853600123-0\r\nevent: phi3.adapter.swapped\r\ndata: {"adapter": '
        '"20260131", "previous": null, "timestamp": "2026-01-31T10:00:00Z"}\r\n\r\n'
    ],
}


def _known_types(value: object) -> object:
    types = frozenset(str(value).split(","))
    if not types <= PAYLOADS.keys():
        raise PydanticCustomError(
            "event_type",
            "Input should be event types separated by commas, of {known}",
            {"known": ", ".join(PAYLOADS)},
        )
    return value


_DOCUMENTED_ID: Final[dict[str, Any]] = {"pattern": "^[0-9]{1,19}-[0-9]{1,19}$"}
"""Narrower than what is accepted: a number of twenty digits may have more than 64 bits."""


def _entry_id(value: object) -> object:
    try:
        EntryId.parse(str(value))
    except ValueError:
        raise PydanticCustomError(
            "entry_id", "Input should be the id of a stream entry, such as 1769853600123-0"
        ) from None
    return value


async def _listening(
    request: Request,
    sidecar: CurrentSidecar,
    types: Annotated[
        Annotated[str, BeforeValidator(_known_types)] | None,
        Query(
            description="the types of the events, separated by commas; default: all",
            examples=["phi3.proposal.created,phi3.proposal.assessed"],
        ),
    ] = None,
    last_event_id: Annotated[
        Annotated[str, BeforeValidator(_entry_id)] | None,
        Header(
            description="the `id` of the last event that the client has; the stream continues "
            "after it. `0-0` begins with the oldest event that Redis has",
            json_schema_extra=_DOCUMENTED_ID,
            examples=["1769853600123-0"],
        ),
    ] = None,
) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
    """Opens the stream before the response starts, so that an error gets a status code.

    A HEAD request opens no stream, and gets no events.
    """
    if request.method == "HEAD":
        await sidecar.event_feed.check()
        yield _no_events()
        return
    after = None if last_event_id is None else EntryId.parse(last_event_id)
    async with sidecar.event_feed.listen(after) as feed:
        yield _events(feed, None if types is None else frozenset(types.split(",")))


@endpoint(
    router,
    "GET",
    "/events/",
    422,
    429,
    503,
    content={"text/event-stream": {"schema": _EVENTS}},
    response_class=EventSourceResponse,
    response_description="The events, until the client disconnects or the server ends",
)
async def stream_events(
    request: Request,
    events: Annotated[AsyncIterator[ServerSentEvent], Depends(_listening)],
) -> EventSourceResponse:
    """Server-sent events with every event that any sidecar adds to the stream in Redis.

    `Last-Event-ID` resumes a stream. If events after that id may be missing, because Redis keeps a
    limited number or has lost them, an event `gap` comes first. The stream continues after an
    outage of Redis. A slow reader gets the same events later.
    """
    return EventSourceResponse(
        events,
        ping=KEEP_ALIVE,
        shutdown_event=request.app.state.shutdown.streams_end,
        shutdown_grace_period=_SHUTDOWN_GRACE,
    )


async def _events(feed: Feed, types: frozenset[str] | None) -> AsyncIterator[ServerSentEvent]:
    async for item in feed:
        if isinstance(item, Gap):
            gap = {"from": str(item.after), "to": str(item.to)}
            yield ServerSentEvent(event="gap", data=json.dumps(gap))
        elif types is None or item.fields.get("type") in types:
            yield ServerSentEvent(
                id=str(item.id), event=item.fields.get("type"), data=item.fields.get("data", "")
            )


async def _no_events() -> AsyncIterator[ServerSentEvent]:
    return
    yield


@endpoint(router, "GET", "/events/dead", 422, 503, response_description="A page of dead letters")
async def list_dead_letters(
    sidecar: CurrentSidecar,
    limit: PageLimit = 100,
    before: Annotated[
        Annotated[str, BeforeValidator(_entry_id)] | None,
        Query(
            description="`next` of the previous page; leave it out for the first page",
            json_schema_extra=_DOCUMENTED_ID,
            examples=["1769853600123-0"],
        ),
    ] = None,
) -> DeadLetterPage:
    """The entries of the inbox that no sidecar could store, newest first.

    They are invalid, or storing them failed five times.
    """
    letters, following = await dead_letters.page(sidecar.dead_letters, limit, before)
    return DeadLetterPage(
        items=[DeadLetterItem.model_validate(letter.as_json()) for letter in letters],
        next=following,
    )


@endpoint(
    router,
    "POST",
    "/events/dead/{id}/requeue",
    404,
    422,
    503,
    504,
    headers=(REPLAYED,),
    response_model=Requeued,
    response_description="The entry is in the inbox again",
)
async def requeue_dead_letter(
    letter_id: Annotated[
        Text,
        Path(alias="id", description="the `id` of the dead letter", examples=["1769853600123-0"]),
    ],
    request: Request,
    sidecar: CurrentSidecar,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Puts a dead letter back into the inbox as a new entry, which a sidecar then tries to store.

    An entry that is already stored is not stored twice.
    """

    # Without a key, a retry gets 404, because the dead letter has gone.
    async def answer(_: Attempt) -> Response:
        entry = await dead_letters.requeue(sidecar.dead_letters, letter_id)
        requeued = Requeued(message="The entry is in the inbox again.", id=letter_id, entry=entry)
        return JSONResponse(requeued.model_dump())

    return await answered_once(request, idempotency_key, sidecar.idempotency, answer)
