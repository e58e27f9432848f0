"""`/v1/audio/speech` with a voice of the test."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from llm_sidecar.errors import SidecarError, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.settings import Settings
from llm_sidecar.tts import wav
from llm_sidecar.tts.speaker import Speaker
from llm_sidecar.tts.voice import AUDIO_BYTES, Reference, Wav
from osiris.openai.audio_speech import _parts
from osiris.openai.schemas.audio_speech import MAX_INPUT
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar

SETTINGS = Settings.from_environ({"REDIS_URL": "memory://", "MAX_PROMPT_CHARS": "4000"})
RATE = 22_050
PARTS = [np.arange(100, 149, dtype=np.int16), np.arange(-300, -202, dtype=np.int16)]
"""49 and 98 samples: 53.3 and 106.7 at 24,000 a second."""
WHOLE = np.concatenate(PARTS)


class PartsVoice:
    """Speaks the same two parts for any text, then raises its error if it has one."""

    name = "piper"
    clones = False
    unavailable: str | None = None

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.error: SidecarError | None = None

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        self.texts.append(text)
        for samples in PARTS:
            yield Wav(samples, RATE)
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Has nothing to free."""


class SpeechBus:
    """Records published messages."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, channel: str, payload: str) -> bool:
        self.published.append((channel, base64.b64decode(payload)))
        return True


@pytest.fixture
def voice() -> PartsVoice:
    return PartsVoice()


@pytest.fixture
def bus() -> SpeechBus:
    return SpeechBus()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(SETTINGS)


@pytest.fixture
async def asking(
    app: FastAPI, voice: PartsVoice, bus: SpeechBus
) -> AsyncIterator[httpx.AsyncClient]:
    sidecar = FakeSidecar(SETTINGS).sidecar
    sidecar.speaker = Speaker(cast(EventBus, bus), [voice])
    app.state.sidecar = sidecar
    async with client(app) as made:
        yield made


async def ask(asking: httpx.AsyncClient, **body: Any) -> httpx.Response:
    sent = {"model": "tts-1", "voice": "alloy", "input": "Sell it.", **body}
    return await asking.post("/v1/audio/speech", json=sent)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in response.text.replace("\r\n", "\n").strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def at_24_000(samples: np.ndarray[Any, Any]) -> bytes:
    return wav.pcm_bytes(wav.resample(Wav(samples, RATE), 24_000))


async def test_without_a_format_the_answer_is_the_wav_of_speak(
    asking: httpx.AsyncClient, voice: PartsVoice, bus: SpeechBus
) -> None:
    response = await ask(asking)
    assert response.status_code == 200
    assert response.headers["content-type"] == "audio/wav"
    assert response.headers["X-Voice"] == "piper"
    assert response.content == wav.encode(Wav(WHOLE, RATE))
    assert voice.texts == ["Sell it."]
    assert bus.published == [(AUDIO_BYTES, wav.encode(Wav(part, RATE))) for part in PARTS]


async def test_pcm_has_24000_samples_a_second_and_no_header(asking: httpx.AsyncClient) -> None:
    response = await ask(asking, response_format="pcm")
    assert response.headers["content-type"] == "audio/pcm"
    assert response.content == at_24_000(WHOLE)
    assert len(response.content) == 2 * 160


async def test_events_have_each_part_of_the_wav(asking: httpx.AsyncClient, bus: SpeechBus) -> None:
    response = await ask(asking, stream_format="sse")
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, done = events_of(response)
    assert (first["type"], second["type"]) == ("speech.audio.delta", "speech.audio.delta")
    file = base64.b64decode(first["audio"]) + base64.b64decode(second["audio"])
    assert file == wav.open_header(RATE) + wav.pcm_bytes(Wav(WHOLE, RATE))
    with wave.open(io.BytesIO(file)) as read:
        assert (read.getframerate(), read.getnchannels(), read.getsampwidth()) == (RATE, 1, 2)
        assert read.readframes(read.getnframes()) == wav.pcm_bytes(Wav(WHOLE, RATE))
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    }
    assert len(bus.published) == 2


async def test_events_have_each_part_as_pcm(asking: httpx.AsyncClient) -> None:
    response = await ask(asking, stream_format="sse", response_format="pcm")
    *deltas, _ = events_of(response)
    audio = [base64.b64decode(event["audio"]) for event in deltas]
    assert audio == [at_24_000(part) for part in PARTS]


async def test_an_error_after_the_first_part_is_an_event(
    asking: httpx.AsyncClient, voice: PartsVoice
) -> None:
    voice.error = VoiceUnavailable("The voice broke.", retry_after=5)
    response = await ask(asking, stream_format="sse")
    *_, last = response.text.replace("\r\n", "\n").strip().split("\n\n")
    assert json.loads(last.partition("data: ")[2])["error"]["message"] == "The voice broke."
    whole = await ask(asking)
    assert (whole.status_code, whole.headers["Retry-After"]) == (503, "5")
    assert whole.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
async def test_a_text_without_a_sound_names_input(
    asking: httpx.AsyncClient, stream_format: str
) -> None:
    response = await ask(asking, input="...", stream_format=stream_format)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "input: there is no letter or digit in it to speak"
    )
    assert response.json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "mp3"}, "response_format"),
        ({"stream_format": "ogg"}, "stream_format"),
        ({"speed": 1.5}, "speed"),
        ({"instructions": "Whisper."}, "instructions"),
        ({"input": ""}, "input"),
        ({"input": " \n "}, "input"),
        ({"input": "a" * (MAX_INPUT + 1)}, "input"),
        ({"input": "a" * 4001}, "input"),
        ({"input": "a\x00b"}, "input"),
        ({"input": None}, "input"),
        ({"voice": {"id": "voice_1"}}, "voice"),
        ({"voice": None}, "voice"),
        ({"voice": "a" * 129}, "voice"),
        ({"model": None}, "model"),
        ({"model": "a" * 129}, "model"),
    ],
)
async def test_bad_input_names_its_field(
    asking: httpx.AsyncClient, voice: PartsVoice, body: dict[str, Any], param: str
) -> None:
    response = await ask(asking, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert voice.texts == []


async def test_harmless_fields_are_ignored(asking: httpx.AsyncClient) -> None:
    response = await ask(asking, speed=1.0, instructions="", response_format="wav")
    assert response.status_code == 200


async def test_the_voice_does_not_wait_for_a_slow_client(voice: PartsVoice, bus: SpeechBus) -> None:
    speaker = Speaker(cast(EventBus, bus), [voice])
    reading = _parts(speaker, "Sell it.")
    assert (await anext(reading)).samples.tolist() == PARTS[0].tolist()
    # Another text is spoken while the first one is not read to its end.
    assert (await asyncio.wait_for(speaker.speak("Buy it."), 10)).voice == "piper"
    assert [part.samples.tolist() async for part in reading] == [PARTS[1].tolist()]


async def test_closing_the_parts_stops_the_speech(bus: SpeechBus) -> None:
    speaker = Speaker(cast(EventBus, bus), [EndlessVoice()])
    reading = _parts(speaker, "Sell it.")
    await anext(reading)
    await reading.aclose()
    assert speaker.status()["waiting"] == 0


class EndlessVoice(PartsVoice):
    """Never ends."""

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        while True:
            yield Wav(PARTS[0], RATE)
            await asyncio.sleep(0)
