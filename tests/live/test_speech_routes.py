"""`/speak` and `/stream/audio`, over HTTP against a running server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from starlette.types import Message

from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.tts import piper, wav
from llm_sidecar.tts.text import split
from llm_sidecar.tts.voice import Wav
from llm_sidecar.tts.worker import SpeechWorker
from osiris.llm_client import LLMClient
from osiris.routes import speech
from osiris.server import create_app
from tests.in_process import in_process
from tests.integration.test_tts import BAD_REFERENCES, GOOD, LONG, SOME
from tests.live_server import LiveServer, serve
from tests.tones import TONE, Tones

REFERENCE = base64.b64encode(GOOD).decode()


@pytest.fixture(scope="module", params=["espeak"])
def voice(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server without models, with few listeners, and a TMPDIR in which nothing may stay."""
    folder = tmp_path_factory.mktemp("voice")
    temporary = folder / "tmp"
    temporary.mkdir()
    with serve(
        folder,
        TTS_VOICE=request.param,
        TMPDIR=str(temporary),
        MAX_AUDIO_LISTENERS="3",
        SHUTDOWN_GRACE_SECONDS="1",
    ) as running:
        yield running
        assert list(temporary.iterdir()) == []


both_voices = pytest.mark.parametrize("voice", ["espeak", "piper"], indirect=True)


def say(server: LiveServer, text: str, **more: Any) -> httpx.Response:
    return server.client.post("/speak", json={"text": text, **more})


def samples(response: httpx.Response) -> npt.NDArray[np.int16]:
    assert response.status_code == 200, response.text
    return wav.decode(response.content).samples


def listening(server: LiveServer) -> int:
    return server.total("speech", "listeners")


@contextlib.contextmanager
def listener(server: LiveServer) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with httpx.stream("GET", f"{server.url}/stream/audio", timeout=10) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.iter_lines()


def event(lines: Iterator[str]) -> bytes:
    """The next event's WAV."""
    data = next(line for line in lines if line.startswith("data: "))
    return base64.b64decode(data.removeprefix("data: "), validate=True)


# /speak


@both_voices
@pytest.mark.parametrize("path", ["/speak", "/speak/"])
def test_a_text_is_answered_with_a_wav(voice: LiveServer, path: str) -> None:
    response = voice.client.post(path, json={"text": " Take the profit on AAPL. "})
    assert np.abs(samples(response)).max() > 5000
    assert response.headers["content-type"] == "audio/wav"
    assert response.headers["x-voice"] == voice.client.get("/health").json()["speech"]["voice"]
    assert "x-voice-reference" not in response.headers


@both_voices
def test_a_reference_that_the_voice_cannot_use_is_said_to_be_ignored(voice: LiveServer) -> None:
    response = say(voice, "Hello there.", ref_wav_b64=REFERENCE)
    samples(response)
    assert response.headers.get_list("x-voice-reference") == ["ignored"]


def test_the_client_speaks_with_a_reference_larger_than_other_bodies(voice: LiveServer) -> None:
    large = wav.encode(Wav(np.ones(1_000_000, np.int16), 48_000))
    with LLMClient(voice.url) as client:
        assert client.speak("Hello.", ref_wav=large).startswith(b"RIFF")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": " \n\t "},
        {"text": "..."},
        {"text": "\x00\x01"},
        {"text": "a" * 100_000},
        {"text": 7},
        {"text": "Hi", "exaggeration": -0.1},
        {"text": "Hi", "exaggeration": 2.1},
        {"text": "Hi", "exaggeration": "much"},
        {"text": "Hi\x1b[31m"},
        *({"text": "Hi", "ref_wav_b64": encoded} for encoded in BAD_REFERENCES.values()),
    ],
    ids=lambda body: str(body)[:60].replace("/", ""),
)
def test_bad_input_is_422_and_names_the_field(voice: LiveServer, body: dict[str, Any]) -> None:
    response = voice.client.post("/speak", json=body)
    assert response.status_code == 422
    assert list({"text": "", **body})[-1] in str(response.json()["detail"])


def test_an_exaggeration_that_is_no_number_is_422(voice: LiveServer) -> None:
    headers = {"Content-Type": "application/json"}
    for value in (b"NaN", b"Infinity"):
        body = b'{"text": "Hi", "exaggeration": %s}' % value
        assert voice.client.post("/speak", content=body, headers=headers).status_code == 422


@both_voices
@pytest.mark.parametrize(
    "text",
    [
        "<speak><break time='60s'/>Hello</speak>",
        "$(rm -rf /); `id` | cat > /etc/x & ${HOME}",
        "Hello\tthere\u202e\u0378\r\n",
        "価格 is up \N{ROCKET}",
        "../../etc/passwd %s %n {0}",
    ],
)
def test_odd_text_is_plain_speech(voice: LiveServer, text: str) -> None:
    assert len(samples(say(voice, text))) > 5000


def test_only_speak_takes_large_bodies(voice: LiveServer) -> None:
    body = {"prompt": "x" * (2 << 20)}
    assert voice.client.post("/generate/phi3/", json=body).status_code == 413
    ten_minutes = base64.b64encode(wav.encode(Wav(np.ones(16_000 * 600, np.int16), 16_000)))
    assert say(voice, "Hi", ref_wav_b64=ten_minutes.decode()).status_code == 413


def outline(spoken: npt.NDArray[np.int16]) -> tuple[int, npt.NDArray[np.floating[Any]]]:
    """A speech's length, and its loudness in 100 steps."""
    steps = np.array_split(spoken.astype(np.float32) ** 2, 100)
    return len(spoken), np.sqrt([step.mean() for step in steps])


def difference(
    one: tuple[int, npt.NDArray[np.floating[Any]]],
    other: tuple[int, npt.NDArray[np.floating[Any]]],
) -> float:
    """How far apart in length and loudness; the voice itself varies a little each time."""
    lengths = sorted((one[0], other[0]))
    alike = np.corrcoef(one[1], other[1])[0, 1]
    return float(1 - alike + 10 * (lengths[1] / lengths[0] - 1))


def test_fifty_at_once_each_get_their_own_speech(voice: LiveServer) -> None:
    tickers = ("apple", "gold", "momentum", "oil futures", "the S and P", "a", "bonds")
    texts = [f"{tickers[n % 7]} {'up' * (n % 3)} {n * 37}. Then {n}." for n in range(50)]
    alone = [outline(samples(say(voice, text))) for text in texts]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=voice.url, timeout=60) as client:
            asking = [client.post("/speak", json={"text": text}) for text in texts]
            return await asyncio.gather(*asking)

    began = time.monotonic()
    responses = asyncio.run(all_at_once())
    assert time.monotonic() - began < 20
    concurrent = [outline(samples(response)) for response in responses]
    for n, spoken in enumerate(concurrent):
        differences = [difference(spoken, other) for other in alone]
        assert differences[n] < 0.15
        assert int(np.argmin(differences)) == n, texts[n]


async def test_a_full_queue_is_429_and_a_deadline_504(tmp_path: Path) -> None:
    limits = {"TTS_QUEUE_LENGTH": "2", "TTS_TIMEOUT_SECONDS": "0.02"}
    async with in_process(tmp_path, **limits) as client:
        asking = [client.post("/speak", json={"text": LONG}) for _ in range(8)]
        responses = await asyncio.gather(*asking)
    assert {response.status_code for response in responses} == {429, 504}
    late = r"The text was not spoken within 0.02 s: \d\.\d s waiting, \d\.\d s speaking; .*\."
    for response in responses:
        if response.status_code == 429:
            assert "speech queue is full" in response.json()["detail"]
        else:
            assert re.fullmatch(late, response.json()["detail"])
        assert int(response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("voice", ["chatterbox", "piper"])
async def test_a_voice_that_is_not_there_is_503_and_says_what_to_do(
    voice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piper, "_installed_folder", lambda: None)
    async with in_process(tmp_path, TTS_VOICE=voice) as client:
        response = await client.post("/speak", json={"text": "Hello."})
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert "TTS_VOICE" in response.json()["detail"]
        health = (await client.get("/health")).json()
        assert health["speech"]["state"] == "unavailable"


async def test_without_a_worker_and_without_piper_espeak_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piper, "_installed_folder", lambda: None)
    async with in_process(tmp_path, TTS_VOICE="auto") as client:
        response = await client.post("/speak", json={"text": "Hello."})
    assert (response.status_code, response.headers["X-Voice"]) == (200, "espeak")


def test_piper_is_loaded_at_the_start_if_models_are(tmp_path: Path) -> None:
    with serve(tmp_path, TTS_VOICE="auto", PRELOAD_MODELS="true") as server:
        server.wait_until(lambda: "the Piper voice is ready" in server.logged())
        assert server.client.get("/health").json()["speech"]["voice"] == "piper"


async def test_a_worker_speaks_if_there_is_one_and_piper_if_it_fails(
    redis_url: str, tmp_path: Path
) -> None:
    environ = {"REDIS_URL": redis_url, "TTS_VOICE": "auto"}
    async with in_process(tmp_path, **environ) as client, worker(redis_url) as worker_id:
        speech: dict[str, Any] = {}
        while not speech.get("workers"):
            await asyncio.sleep(0.02)
            speech = (await client.get("/health")).json()["speech"]
        assert [shown["worker_id"] for shown in speech["workers"]] == [worker_id]
        assert (speech["voice"], speech["queued"]) == ("chatterbox", 0)
        responses = [
            await client.post("/speak", json={"text": text, "ref_wav_b64": REFERENCE})
            for text in ("Up we go.", "We break", "break")
        ]
    assert [response.status_code for response in responses] == [200, 503, 200]
    spoken, broken, embedded = responses
    assert spoken.headers["X-Voice"] == "chatterbox"
    assert "X-Voice-Reference" not in spoken.headers
    assert len(samples(spoken)) == 3 * TONE
    assert broken.json()["detail"] == "the voice failed: see the worker's log"
    assert embedded.headers["X-Voice"] == "piper"
    assert embedded.headers["X-Voice-Reference"] == "ignored"


@contextlib.asynccontextmanager
async def worker(redis_url: str) -> AsyncIterator[str]:
    """The id of a speech worker."""
    async with make_client(redis_url) as client:
        worker = SpeechWorker(client, Tones())
        await worker.start()
        yield worker.worker_id
        await worker.close()


@both_voices
def test_a_client_that_hangs_up_stops_its_speech(voice: LiveServer) -> None:
    text = " ".join([LONG] * 4)
    before = voice.total("speech", "spoken")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{voice.url}/speak", json={"text": text}, timeout=httpx.Timeout(5, read=0.05))
    voice.wait_until(lambda: voice.total("speech", "waiting") == 0, 5)
    assert voice.total("speech", "spoken") == before


# /stream/audio


@both_voices
def test_every_listener_gets_every_wav(voice: LiveServer) -> None:
    with listener(voice) as one, listener(voice) as two:
        spoken = [say(voice, text).content for text in ("The first.", "And the second.")]
        assert [event(one), event(one)] == [event(two), event(two)] == spoken
    voice.wait_until(lambda: listening(voice) == 0, 2)


async def test_a_listener_hears_what_other_sidecars_speak(redis_url: str, tmp_path: Path) -> None:
    async with in_process(tmp_path / "other", REDIS_URL=redis_url) as other:
        while not (await other.get("/health")).json()["event_bus"]["connected"]:
            await asyncio.sleep(0.02)
        with serve(tmp_path, REDIS_URL=redis_url) as one, listener(one) as lines:
            spoken = await other.post("/speak", json={"text": "Said next door."})
            assert await asyncio.to_thread(event, lines) == spoken.content


@both_voices
def test_a_long_texts_first_part_arrives_before_the_response(voice: LiveServer) -> None:
    is_slow = voice.client.get("/health").json()["speech"]["voice"] == "piper"
    text = " ".join([SOME] * 3 if is_slow else [LONG] * 4)
    with listener(voice) as lines, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(say, voice, text)
        first = wav.decode(event(lines)).samples
        assert not whole.done()
        assert len(first) < len(samples(whole.result())) / 10


def test_a_listener_beyond_the_limit_is_429(voice: LiveServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3 * len(voice.sidecars)):
            stack.enter_context(listener(voice))
        response = voice.client.get("/stream/audio")
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
    voice.wait_until(lambda: listening(voice) == 0, 2)


@pytest.mark.not_on("ray", "its proxy keeps all that a slow reader has not read")
def test_a_slow_listener_is_told_what_it_lost(voice: LiveServer) -> None:
    text = " ".join([LONG] * 4)
    with listener(voice) as slow:
        parts = lost = 0
        before = voice.total("speech", "lost")
        while not lost:
            samples(say(voice, text))
            parts += len(split(text))
            lost = voice.total("speech", "lost") - before
        received = announced = 0
        while received + announced < parts:
            line = next(slow)
            if line == "event: lost":
                announced += int(next(slow).removeprefix("data: "))
            else:
                received += line.startswith("data: ")
        assert announced == lost


async def test_a_silent_stream_has_comments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speech, "KEEP_ALIVE", 0.01)
    settings = Settings(events={"url": "memory://"}, database={"uri": str(tmp_path)})
    app = create_app(settings)
    app.state.sidecar = sidecar = Sidecar(settings)
    commented = asyncio.Event()

    async def receive() -> Message:
        await commented.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body", b"").startswith(b": "):
            commented.set()

    scope = {"type": "http", "method": "GET", "path": "/stream/audio", "query_string": b""}
    await asyncio.wait_for(app({**scope, "headers": []}, receive, send), 5)
    assert sidecar.listeners.count == 0
    await sidecar._bus.close()


@pytest.mark.own_process("sends a signal")
@pytest.mark.parametrize("reads", [True, False])
def test_open_streams_do_not_hold_up_a_shutdown(tmp_path: Path, reads: bool) -> None:
    with serve(tmp_path, SHUTDOWN_GRACE_SECONDS="1") as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.socket() as stream:
            if not reads:
                # Then it soon takes no more.
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            stream.connect((address[0], int(address[1])))
            stream.sendall(b"GET /stream/audio HTTP/1.1\r\nHost: x\r\n\r\n")
            assert stream.recv(12) == b"HTTP/1.1 200"
            for _ in range(1 if reads else 2):
                samples(say(server, " ".join([LONG] * 2)))
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            received = b""
            while reads and (data := stream.recv(1 << 16)):
                received += data
            status = server.process.wait(10)
        assert time.monotonic() - began < (3.0 if reads else 5.0)
        assert status == 0
        log = server.log.read_text()
        assert "Application shutdown complete" in log
        assert "Traceback" not in log
        if reads:
            assert received.endswith(b"0\r\n\r\n")
            assert "ERROR" not in log
