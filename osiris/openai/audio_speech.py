"""`/v1/audio/speech`: text to speech, with the voice, queue and event bus of `/speak`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from sse_starlette import ServerSentEvent

from llm_sidecar.tts import wav
from llm_sidecar.tts.speaker import Speaker
from llm_sidecar.tts.voice import Wav
from osiris.dependencies import CurrentSidecar
from osiris.disconnects import cancel_on_disconnect
from osiris.event_stream import event_stream
from osiris.openai.endpoint import STREAM, openai_endpoint
from osiris.openai.errors import error_event
from osiris.openai.limits import check_chars
from osiris.openai.schemas.audio_speech import AudioDelta, AudioDone, SpeechRequest

router = APIRouter(tags=["openai"])

PCM_RATE: Final = 24_000
"""Samples per second of OpenAI's `pcm`; clients assume it."""
_MEDIA_TYPES: Final = {"wav": "audio/wav", "pcm": "audio/pcm"}
_AUDIO: Final = {"schema": {"type": "string", "format": "binary"}}
_CONTENT: Final[dict[str, Any]] = {"audio/wav": _AUDIO, "audio/pcm": _AUDIO, **STREAM}


@openai_endpoint(
    router,
    "POST",
    "/v1/audio/speech",
    422,
    429,
    503,
    504,
    optional_headers=("X-Voice",),
    content=_CONTENT,
    response_class=Response,
    response_description="The audio",
)
async def create_speech(body: SpeechRequest, request: Request, sidecar: CurrentSidecar) -> Response:
    """Speaks a text, as `/speak` does: each part is also published on `audio.bytes`.

    `X-Voice` names the voice; a stream does not have this header. Each event of a stream is named
    after its `type`: `speech.audio.delta`, with a piece of the audio as base64 in `audio`, and
    finally `speech.audio.done`. In a stream, the header of a WAV has the largest possible length.
    """
    check_chars("input", len(body.input), sidecar.settings.limits.max_prompt_chars)
    if body.stream_format == "sse":
        return await event_stream(
            request, _events(sidecar.speaker, body), failed=functools.partial(error_event, request)
        )
    parts: list[Wav] = []
    speaking = sidecar.speaker.speak(body.input, on_part=parts.append)
    spoken = await cancel_on_disconnect(request, speaking)
    audio = spoken.wav
    if body.response_format == "pcm":
        audio = await asyncio.to_thread(_pcm, wav.join(parts))
    return Response(
        audio, media_type=_MEDIA_TYPES[body.response_format], headers={"X-Voice": spoken.voice}
    )


async def _events(speaker: Speaker, body: SpeechRequest) -> AsyncGenerator[ServerSentEvent, None]:
    header_sent = False
    async with contextlib.aclosing(_parts(speaker, body.input)) as parts:
        async for part in parts:
            if body.response_format == "pcm":
                audio = await asyncio.to_thread(_pcm, part)
            else:
                header = b"" if header_sent else wav.open_header(part.sample_rate)
                audio, header_sent = header + wav.pcm_bytes(part), True
            yield _as_event(AudioDelta(audio=base64.b64encode(audio).decode()))
    yield _as_event(AudioDone())


async def _parts(speaker: Speaker, text: str) -> AsyncGenerator[Wav, None]:
    """Each part of the text as soon as it is spoken.

    The voice does not wait for the client, because it speaks only one text at a time. So the parts
    of that text wait in memory.
    """
    spoken = asyncio.Queue[Wav | None]()
    speaking = asyncio.create_task(speaker.speak(text, on_part=spoken.put_nowait))
    speaking.add_done_callback(lambda _: spoken.put_nowait(None))
    try:
        while (part := await spoken.get()) is not None:
            yield part
        await speaking
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)


def _pcm(part: Wav) -> bytes:
    return wav.pcm_bytes(wav.resample(part, PCM_RATE))


def _as_event(event: AudioDelta | AudioDone) -> ServerSentEvent:
    return ServerSentEvent(event=event.type, data=event.model_dump_json())
