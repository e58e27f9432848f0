"""The real package with random weights: a worker process in its own environment, asked from here.

The variable CHATTERBOX_PYTHON names that environment's python, CHATTERBOX_STAND_IN the checkpoint
that `tests.chatterbox.stand_in` wrote.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_sidecar.errors import InvalidRequest, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.voice import Reference, Wav
from tests.live_server import ROOT, serve
from tests.redis_server import RedisServer, require_redis

TIMEOUT = float(os.environ.get("CHATTERBOX_TEST_TIMEOUT", "600"))
"""Seconds that loading, or one part of speech, may take on a slow and busy machine."""
RATE = 24_000

log = logging.getLogger(__name__)


class Worker:
    """A worker process whose temporary files, caches and log are in folders of the test's own."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.temporary, self.home = folder / "tmp", folder / "home"
        self.temporary.mkdir()
        self.home.mkdir()
        self.log = folder / "worker.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [os.environ["CHATTERBOX_PYTHON"], "-m", "tests.chatterbox.worker"],
                env=environment(
                    REDIS_URL=redis_url,
                    CHATTERBOX_MODEL_DIR=os.environ["CHATTERBOX_STAND_IN"],
                    TMPDIR=str(self.temporary),
                    HF_HOME=str(self.home),
                ),
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def environment(**variables: str) -> dict[str, str]:
    """An environment in which whatever would be downloaded fails, and no bars of progress show."""
    nowhere = "http://127.0.0.1:9"
    proxies = {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "HF_ENDPOINT": nowhere}
    passed = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    return {**passed, **proxies, "TQDM_DISABLE": "1", **variables}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server that is not there yet: the worker has to wait for it."""
    require_redis()
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def worker(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    started = time.monotonic()
    worker = Worker(tmp_path_factory.mktemp("worker"), server.url)
    try:
        while " is ready" not in worker.log.read_text():
            assert worker.process.poll() is None, worker.log.read_text()
            assert time.monotonic() < started + TIMEOUT, worker.log.read_text()
            time.sleep(0.1)
        log.info("the worker was ready after %.1f s", time.monotonic() - started)
        server.start()
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture
async def voice(worker: Worker, server: RedisServer) -> AsyncIterator[RemoteVoice]:
    voice = RemoteVoice(make_client(server.url), part_timeout=TIMEOUT)
    await voice.start()
    await until(lambda: voice.unavailable is None)
    yield voice
    await voice.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


async def say(
    voice: RemoteVoice, text: str, exaggeration: float = 0.5, reference: Reference | None = None
) -> list[Wav]:
    started, spoken = time.monotonic(), []
    async for part in voice.speak(text, exaggeration=exaggeration, reference=reference):
        spoken.append(part)
        log.info(
            "part %d of %r, %s a reference: %.2f s of speech at %d Hz, %.1f s after the request",
            len(spoken),
            text,
            "without" if reference is None else "with",
            len(part.samples) / part.sample_rate,
            part.sample_rate,
            time.monotonic() - started,
        )
    return spoken


def siren(seconds: float) -> Reference:
    """A reference WAV, at a rate that is not Chatterbox's own."""
    times = np.arange(int(seconds * 16_000)) / 16_000
    phase = 2 * np.pi * (300 * times + 10 * np.sin(2 * np.pi * 3 * times))
    samples = (np.sin(phase) * 12_000).astype(np.int16)
    return Reference(wavs.encode(Wav(samples, 16_000)), seconds)


def is_speech(part: Wav, text: str) -> bool:
    """Whether it is audible, at 24 kHz, and no longer than the bound on its text's length."""
    # 25 speech tokens a second; a stand-in's text token is a character, and two frame the text.
    bound = (50 + 12 * (len(text) + 2)) / 25
    loudness = float(np.sqrt(np.mean(part.samples.astype(float) ** 2)))
    return part.sample_rate == RATE and 0 < len(part.samples) <= bound * RATE and loudness > 1


async def test_it_speaks_in_the_built_in_voice_part_by_part(voice: RemoteVoice) -> None:
    assert (voice.name, voice.clones) == ("chatterbox", True)
    spoken = await say(voice, "Up. Down.")
    assert len(spoken) == 2
    assert is_speech(spoken[0], "Up.")
    assert is_speech(spoken[1], "Down.")


async def test_it_speaks_in_the_voice_of_a_reference_and_leaves_no_file(
    voice: RemoteVoice, worker: Worker
) -> None:
    before = files(worker.temporary, worker.home)
    (part,) = await say(voice, "Up.", exaggeration=1.5, reference=siren(1.6))
    assert is_speech(part, "Up.")
    assert files(worker.temporary, worker.home) == before


async def test_a_bad_exaggeration_and_a_bad_reference_are_refused(voice: RemoteVoice) -> None:
    with pytest.raises(InvalidRequest, match="exaggeration"):
        await say(voice, "Up.", exaggeration=2.5)
    with pytest.raises(InvalidRequest):
        await say(voice, "Up.", reference=Reference(b"no WAV", 1.0))


@pytest.mark.parametrize("cloning", [False, True])
def test_a_server_speaks_through_it(
    worker: Worker, server: RedisServer, tmp_path: Path, cloning: bool
) -> None:
    body = {"text": "Up."}
    if cloning:
        body["ref_wav_b64"] = base64.b64encode(siren(1.6).wav).decode()
    with serve(
        tmp_path,
        REDIS_URL=server.url,
        TTS_VOICE="chatterbox",
        TTS_TIMEOUT_SECONDS=str(TIMEOUT),
    ) as sidecar:
        sidecar.client.timeout = TIMEOUT
        sidecar.wait_until(
            lambda: sidecar.client.get("/health").json()["speech"]["state"] == "ready"
        )
        started = time.monotonic()
        response = sidecar.client.post("/speak", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-voice"] == "chatterbox"
    assert "x-voice-reference" not in response.headers
    spoken = wavs.decode(response.content)
    log.info(
        "/speak %s a reference: %.2f s of speech at %d Hz within %.1f s",
        "with" if cloning else "without",
        len(spoken.samples) / spoken.sample_rate,
        spoken.sample_rate,
        time.monotonic() - started,
    )
    assert is_speech(spoken, "Up.")


async def test_a_cancelled_text_makes_room_for_the_next(voice: RemoteVoice) -> None:
    long = "buy " * 60
    asking = asyncio.create_task(say(voice, long))
    await until(lambda: voice.queued == 1)
    asking.cancel()
    await asyncio.wait([asking])
    started = time.monotonic()
    (part,) = await say(voice, "Up.")
    log.info("the text after a cancelled one came within %.1f s", time.monotonic() - started)
    assert is_speech(part, "Up.")


async def test_it_speaks_in_process_and_tells_the_bus(server: RedisServer) -> None:
    bus = EventBus(server.url)
    received: asyncio.Queue[str] = asyncio.Queue(8)
    await bus.connect()
    await bus.register_listener_queue("audio.bytes", received)
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *[os.environ["CHATTERBOX_PYTHON"], "-m", "tests.chatterbox.in_process"],
        *[os.environ["CHATTERBOX_STAND_IN"], server.url, "Up."],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    log.info("in process, loading included: %.1f s", time.monotonic() - started)
    speech = base64.b64decode(received.get_nowait())
    assert hashlib.sha256(speech).hexdigest() == output.decode().split()[-1]
    assert is_speech(wavs.decode(speech), "Up.")
    await bus.close()


async def test_a_signal_ends_it_in_the_middle_of_a_text(voice: RemoteVoice, worker: Worker) -> None:
    asking = asyncio.create_task(say(voice, "buy " * 60))
    await until(lambda: voice.queued == 1)
    assert await asyncio.to_thread(worker.stop) == 0
    with pytest.raises(VoiceUnavailable, match="ended in the middle"):
        await asking
    assert voice.workers() == []
    assert "Traceback" not in worker.log.read_text()
    # torch has its own temporary files while it runs; a library notes its version in its cache.
    assert files(worker.temporary) == set()
    assert all(path.is_dir() or path.stat().st_size < 100 for path in files(worker.home))
