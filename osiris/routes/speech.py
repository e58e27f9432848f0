"""Speech: text spoken, and a stream of everything that any sidecar of the house speaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Final

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from llm_sidecar.sidecar import Sidecar
from llm_sidecar.tts.listeners import Backlog
from llm_sidecar.tts.reference import read_reference
from llm_sidecar.tts.speaker import Spoken
from osiris.http import CurrentSidecar, check_length, endpoint, unless_gone
from osiris.schemas import SpeakRequest

router = APIRouter(tags=["speech"])

SPEAK_BODY_BYTES: Final = 14 << 20
"""Largest body of `/speak`: the largest reference in base64, and text."""
KEEP_ALIVE: Final = 15
"""Seconds between the comments that keep a silent stream open."""
_SHUTDOWN_GRACE: Final = 0.3
"""Seconds in which a stream ends by itself at shutdown; then it is cut off."""


_WAV: Final = {
    "type": "string",
    "format": "binary",
    "description": "a WAV file of 16-bit PCM, one channel",
}
_EVENTS: Final = {
    "type": "string",
    "description": "Server-sent events. One without a name has in `data` one whole WAV file in "
    "base64; an event `lost` has the number of WAVs that this listener missed there. Comments keep "
    "the connection open.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"$ref": "#/components/schemas/AudioEvent"},
    "examples": [": ping\r\n\r\ndata: UklGRiQAAABXQVZFZm10IA==\r\n\r\n"],
}


class WavResponse(Response):
    """A WAV file."""

    media_type = "audio/wav"


@endpoint(
    router,
    "POST",
    "/speak",
    422,
    429,
    503,
    504,
    headers=("X-Voice", "X-Voice-Reference"),
    content={"audio/wav": {"schema": _WAV}},
    response_class=WavResponse,
    response_description="The WAV file",
)
async def speak(body: SpeakRequest, request: Request, sidecar: CurrentSidecar) -> WavResponse:
    """Speaks a text: a WAV of 16-bit PCM, whose parts go out on `audio.bytes` while it is spoken.

    `X-Voice` names the voice. `X-Voice-Reference: ignored` says that the reference was not used,
    because this voice cannot clone.
    """
    check_length(sidecar, body)
    spoken = await unless_gone(request, _speak(sidecar, body))
    headers = {"X-Voice": spoken.voice}
    if body.ref_wav_b64 is not None and not spoken.cloned:
        headers["X-Voice-Reference"] = "ignored"
    return WavResponse(spoken.wav, headers=headers)


async def _speak(sidecar: Sidecar, body: SpeakRequest) -> Spoken:
    # A refusal costs no decoding.
    sidecar.speaker.check_room()
    reference = None
    if body.ref_wav_b64 is not None:
        reference = await asyncio.to_thread(read_reference, body.ref_wav_b64)
    return await sidecar.speaker.speak(body.text, body.exaggeration, reference)


async def _backlog(request: Request, sidecar: CurrentSidecar) -> AsyncIterator[Backlog | None]:
    """Listens from before the response begins until it has ended, however it ends.

    None for a HEAD request, which opens no stream.
    """
    if request.method == "HEAD":
        sidecar.listeners.check_capacity()
        yield None
        return
    async with sidecar.listeners.listen() as backlog:
        yield backlog


@endpoint(
    router,
    "GET",
    "/stream/audio",
    429,
    content={"text/event-stream": {"schema": _EVENTS}},
    response_class=EventSourceResponse,
    response_description="The events, until the client disconnects or the server ends",
)
async def stream_audio(
    request: Request, backlog: Annotated[Backlog | None, Depends(_backlog)]
) -> EventSourceResponse:
    """Server-sent events: every WAV that goes out on `audio.bytes`, base64, one event each.

    A listener that is too slow loses its oldest ones; an event named `lost` says how many, where
    they would have been. Comments keep a silent stream open.
    """
    ending: anyio.Event = request.app.state.shutdown.streams_end
    return EventSourceResponse(
        _events(backlog, ending),
        ping=KEEP_ALIVE,
        shutdown_event=ending,
        shutdown_grace_period=_SHUTDOWN_GRACE,
    )


async def _events(backlog: Backlog | None, ending: anyio.Event) -> AsyncIterator[ServerSentEvent]:
    """Ends with the server's shutdown, so that the response ends as a whole one does."""
    if backlog is None:
        return
    ended = asyncio.create_task(ending.wait())
    try:
        while (payload := await _next(backlog, ended)) is not None:
            if lost := backlog.take_lost():
                yield ServerSentEvent(event="lost", data=str(lost))
            yield ServerSentEvent(data=payload)
    finally:
        ended.cancel()


async def _next(backlog: Backlog, ended: asyncio.Task[None]) -> str | None:
    """What comes next, or None once it has ended."""
    getting = asyncio.create_task(backlog.get())
    try:
        await asyncio.wait([getting, ended], return_when=asyncio.FIRST_COMPLETED)
        return None if ended.done() else getting.result()
    finally:
        getting.cancel()
