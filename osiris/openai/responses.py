"""`/v1/responses`: a model's answer, complete or as events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from sse_starlette import ServerSentEvent

from llm_sidecar.deadline import Deadline
from llm_sidecar.services.answers import Part, joined
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.event_stream import event_stream
from osiris.openai.answers import headers_of
from osiris.openai.endpoint import GENERATION_ERRORS, STREAM, openai_endpoint
from osiris.openai.events import DONE
from osiris.openai.response_events import ResponseEvents
from osiris.openai.response_input import conversation_of, response_of
from osiris.openai.schemas.response_object import Event, as_json
from osiris.openai.schemas.responses import ResponseRequest
from osiris.response_headers import GENERATION

router = APIRouter(tags=["openai"])

_CONTENT: Final[dict[str, Any]] = {
    "application/json": {
        "schema": {
            "type": "object",
            "description": "The response as https://www.openresponses.org/reference describes it",
        }
    },
    **STREAM,
}


@openai_endpoint(
    router,
    "POST",
    "/v1/responses",
    *GENERATION_ERRORS,
    optional_headers=(*GENERATION, "X-Grounded"),
    content=_CONTENT,
    response_class=Response,
    response_description="The response",
)
async def create_response(
    body: ResponseRequest, request: Request, sidecar: CurrentSidecar
) -> Response:
    """Answers a chat in the format of OpenAI's Responses API.

    `phi3` writes a proposal, unless the request has a `text.format` or `tools`. Only a proposal has
    `X-Grounded`. The server stores no responses: send the whole chat each time.

    Each event of a stream is named after its `type`. The last one is `response.completed`,
    `response.incomplete` or `response.failed`, with the whole response; then comes `[DONE]`.
    Comments keep the connection open. A stream has none of the headers of a generation.
    """
    limits = sidecar.settings.limits
    conversation = conversation_of(body, limits.max_prompt_chars)
    deadline = Deadline.after(limits.request_timeout)
    parts = sidecar.conversations.answer(body.model, conversation, deadline)
    events = ResponseEvents(response_of(body), request.scope)
    if body.stream:
        return await event_stream(
            request, _sent(events, parts), failed=functools.partial(_failed, events)
        )
    return await cancel_on_disconnect(request, _whole(events, parts))


async def _whole(events: ResponseEvents, parts: AsyncGenerator[Part, None]) -> Response:
    async with contextlib.aclosing(parts):
        whole = [part async for part in parts]
    # In a thread: the log probabilities may be megabytes of JSON.
    return await asyncio.to_thread(_response, events, whole)


def _response(events: ResponseEvents, parts: Sequence[Part]) -> Response:
    for part in joined(parts):
        events.add(part)
    assert events.finished is not None
    headers = headers_of([events.finished])
    return Response(as_json(events.response), media_type="application/json", headers=headers)


async def _sent(
    events: ResponseEvents, parts: AsyncGenerator[Part, None]
) -> AsyncGenerator[ServerSentEvent, None]:
    async with contextlib.aclosing(events.of(parts)) as stream:
        async for event in stream:
            yield _as_event(event)
    # Open Responses requires this end, and clients of OpenAI accept it.
    yield DONE


def _failed(events: ResponseEvents, error: Exception) -> ServerSentEvent:
    """The last event of a stream that has failed."""
    return DONE if events.response.status == "failed" else _as_event(events.error(error))


def _as_event(event: Event) -> ServerSentEvent:
    return ServerSentEvent(event=event.type, data=as_json(event))
