"""Server-sent events for one request, which end when its client disconnects.

    return await event_stream(request, events(), failed=error_event)

A task generates the events, at most a few ahead of the client, so a slow client slows it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final

from fastapi import Request, Response
from sse_starlette import ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from llm_sidecar.errors import SidecarError
from llm_sidecar.tasks import raise_if_cancelled
from osiris.disconnects import cancel_on_disconnect
from osiris.errors import log_failure
from osiris.shutdown import shutting_down

log = logging.getLogger(__name__)

Events = AsyncGenerator[ServerSentEvent, None]

MEDIA_TYPE: Final = "text/event-stream"
KEEP_ALIVE: Final = 15
"""Seconds between the comments that keep a silent stream open."""
_FIRST_EVENT: Final = 5.0
"""Seconds after which the response starts without an event. An earlier error has its own status; a
later one is an event."""
_AHEAD: Final = 16
"""Maximum number of events that wait for the client; then the generation waits too."""
_JSON: Final = ("application/json", "application/*", "*/*")
"""The media ranges that JSON matches, the most specific first."""
_QUALITY: Final = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

_Item = ServerSentEvent | Exception | None
"""An event or, at the end, the exception that the generation has raised, or None."""


def wants_events(request: Request) -> bool:
    """Whether the client's header `Accept` names server-sent events, with at least the quality of
    JSON.

    See RFC 9110, section 12.5.1. A range such as `*/*` does not name them.
    """
    accepted = ",".join(request.headers.getlist("accept")).lower().split(",")
    qualities = dict(map(_media_range, accepted))
    events = qualities.get(MEDIA_TYPE, 0.0)
    json = next((qualities[kind] for kind in _JSON if kind in qualities), 0.0)
    return events > 0.0 and events >= json


def _media_range(accepted: str) -> tuple[str, float]:
    """A media range and its quality: 1 unless given, 0 if that is not a number."""
    kind, *parameters = (part.strip() for part in accepted.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            return kind, float(value) if _QUALITY.fullmatch(value) else 0.0
    return kind, 1.0


async def event_stream(
    request: Request,
    events: Events,
    failed: Callable[[Exception], ServerSentEvent],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Starts the generation, and returns the response with its events.

    Once the response has started, `failed` makes its last event if the generation fails or the
    server shuts down first.

    Args:
        request: its body has been read.
        events: always started, and closed at the end, even if the client disconnects.
        failed: makes the last event after an error. The response raises an unexpected error again,
            so that it is logged.
        headers: of the response.

    Raises:
        ClientDisconnect: the client has disconnected.
        Exception: the generation failed before its first event.
    """
    queue: asyncio.Queue[_Item] = asyncio.Queue(_AHEAD)
    # The task starts before this one goes on, so it cannot be cancelled before its first step.
    generating = asyncio.create_task(_generate(events, queue))
    try:
        first = await cancel_on_disconnect(request, _next(queue, _FIRST_EVENT))
        if isinstance(first, Exception):
            raise first
    except BaseException:
        await _cancel(generating)
        raise
    return _EventStream(first, queue, generating, failed, headers or {})


class _EventStream(Response):
    """Sends the events; cancels their generation when the response ends, however it ends."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        first: ServerSentEvent | None,
        queue: asyncio.Queue[_Item],
        generating: asyncio.Task[None],
        failed: Callable[[Exception], ServerSentEvent],
        headers: Mapping[str, str],
    ) -> None:
        # Not the headers of Starlette, which would declare a length.
        self.status_code, self.background = 200, None
        # Without this, nginx buffers the events.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self._first = first
        self._queue = queue
        self._generating = generating
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        try:
            await cancel_on_disconnect(Request(scope, receive), self._send(send))
        except ClientDisconnect:
            log.info("the client disconnected; its stream was cancelled")
        finally:
            await _cancel(self._generating)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        item: _Item = self._first
        while isinstance(item, ServerSentEvent):
            await send(_part(item))
            item = await self._following()
        if item is not None:
            await send(_part(self._failed(item)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if item is not None and not isinstance(item, SidecarError):
            raise item

    async def _following(self) -> _Item:
        try:
            item = await _next(self._queue, KEEP_ALIVE)
        except asyncio.CancelledError:
            # The grace period of a shutdown is over, or the client has disconnected and does not
            # receive this.
            return shutting_down()
        if isinstance(item, SidecarError):
            log_failure(item)
        return item


async def _generate(events: Events, queue: asyncio.Queue[_Item]) -> None:
    """Puts all events into the queue, and then the reason for their end."""
    end: Exception | None = None
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                await queue.put(event)
    except asyncio.CancelledError:
        raise_if_cancelled()
        end = RuntimeError("the generation was cancelled before the end of the response")
    except Exception as error:  # noqa: BLE001 - the response raises it
        end = error
    await queue.put(end)


async def _next(queue: asyncio.Queue[_Item], seconds: float) -> _Item:
    """The next item, or a comment after some seconds without one."""
    try:
        async with asyncio.timeout(seconds):
            return await queue.get()
    except TimeoutError:
        return ServerSentEvent(comment="ping")


def _part(event: ServerSentEvent) -> Message:
    return {"type": "http.response.body", "body": event.encode(), "more_body": True}


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
