"""Text to speech, and a stream of the speech of all sidecars on the event bus."""

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
from osiris.dependencies import CurrentSidecar, check_length
from osiris.disconnects import cancel_on_disconnect
from osiris.endpoint import endpoint
from osiris.schemas.speech import SpeakRequest

router = APIRouter(tags=["speech"])

SPEAK_BODY_BYTES: Final = 14 << 20
"""Maximum body size of `/speak`: the largest reference in base64, and the text."""
KEEP_ALIVE: Final = 15
"""Seconds between the comments that keep a silent stream open."""
_SHUTDOWN_GRACE: Final = 0.3
"""Seconds in which a stream can end by itself at shutdown, before it is cancelled."""


_WAV: Final = {
    "type": "string",
    "format": "binary",
    "description": "a WAV file of 16-bit PCM, one channel",
}
_EVENTS: Final = {
    "type": "string",
    "description": "Server-sent events. The `data` of an event without a name is one whole WAV "
    "file in base64. The `data` of an event `lost` is the number of WAVs that this listener "
    "missed. Comments keep the connection open.",
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
    """Speaks a text and returns a WAV of 16-bit PCM.

    Each part of the text is published on `audio.bytes` as soon as it is ready. `X-Voice` names the
    voice. `X-Voice-Reference: ignored` means that the reference was not used, because this voice
    cannot imitate.
    """
    check_length(sidecar, body)
    spoken = await cancel_on_disconnect(request, _speak(sidecar, body))
    headers = {"X-Voice": spoken.voice}
    if body.ref_wav_b64 is not None and not spoken.cloned:
        headers["X-Voice-Reference"] = "ignored"
    return WavResponse(spoken.wav, headers=headers)


async def _speak(sidecar: Sidecar, body: SpeakRequest) -> Spoken:
    # Checked first, because decoding the reference is wasted on a request that is refused.
    sidecar.speaker.check_capacity()
    reference = None
    if body.ref_wav_b64 is not None:
        reference = await asyncio.to_thread(read_reference, body.ref_wav_b64)
    return await sidecar.speaker.speak(body.text, body.exaggeration, reference)


async def _backlog(request: Request, sidecar: CurrentSidecar) -> AsyncIterator[Backlog | None]:
    """Collects WAVs from before the response starts until it has ended.

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
    """Server-sent events with every WAV on `audio.bytes`, in base64, one per event.

    A listener that is too slow misses the oldest WAVs. An event named `lost` then says how many.
    Comments keep an idle stream open.
    """
    ending: anyio.Event = request.app.state.shutdown.streams_end
    return EventSourceResponse(
        _events(backlog, ending),
        ping=KEEP_ALIVE,
        shutdown_event=ending,
        shutdown_grace_period=_SHUTDOWN_GRACE,
    )


async def _events(backlog: Backlog | None, ending: anyio.Event) -> AsyncIterator[ServerSentEvent]:
    """Ends when the server shuts down, so that the response is complete."""
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
    """The next WAV, or None once the stream ends."""
    getting = asyncio.create_task(backlog.get())
    try:
        await asyncio.wait([getting, ended], return_when=asyncio.FIRST_COMPLETED)
        return None if ended.done() else getting.result()
    finally:
        getting.cancel()
