"""Chatterbox where its package is not installed, and the worker's command line."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from llm_sidecar.errors import InvalidRequest, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import ChatterboxTTS
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.__main__ import main
from llm_sidecar.tts.chatterbox import WEIGHTS
from tests.test_tts_remote import Tones


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder that has the right names in it."""
    for name in WEIGHTS:
        (tmp_path / name).touch()
    return tmp_path


async def synth(folder: Path, exaggeration: float = 0.5) -> bytes:
    voice = ChatterboxTTS(folder, "cpu", EventBus("memory://"))
    try:
        return await voice.synth("word", exaggeration=exaggeration)
    finally:
        await voice.close()


async def test_missing_weights_are_named(weights: Path) -> None:
    (weights / "ve.safetensors").unlink()
    (weights / "tokenizer.json").unlink()
    names = r"CHATTERBOX_MODEL_DIR=.* lacks ve\.safetensors, tokenizer\.json"
    with pytest.raises(VoiceUnavailable, match=names):
        await synth(weights)


async def test_without_the_package_it_says_what_to_install_and_to_start(weights: Path) -> None:
    with pytest.raises(VoiceUnavailable, match=r"requirements-chatterbox\.txt.*--voice chatterbox"):
        await synth(weights)


@pytest.mark.parametrize("exaggeration", [-0.1, 2.1, float("nan")])
async def test_an_exaggeration_that_there_is_not_is_refused(
    weights: Path, exaggeration: float
) -> None:
    with pytest.raises(InvalidRequest, match="exaggeration"):
        await synth(weights, exaggeration)


@pytest.mark.parametrize(
    ("redis_url", "said"),
    [
        ("memory://", "REDIS_URL=memory://"),
        ("http://localhost", "REDIS_URL=***"),
        ("redis://localhost:6379/0", "CHATTERBOX_MODEL_DIR"),
    ],
)
def test_the_worker_says_in_one_line_why_it_does_not_start(
    redis_url: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("CHATTERBOX_MODEL_DIR", str(tmp_path))
    assert main(["--voice", "chatterbox"]) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_bad_arguments_end_the_worker_with_2() -> None:
    assert main(["--voice", "parrot"]) == 2


async def test_two_texts_at_once_are_not_mixed_on_the_bus() -> None:
    bus, heard = EventBus("memory://"), asyncio.Queue[str]()
    await bus.connect()
    await bus.register_listener_queue("audio.bytes", heard)
    voice = ChatterboxTTS("nowhere", "cpu", bus)
    voice._voice = Tones()  # type: ignore[assignment]
    wholes = await asyncio.gather(voice.synth("a a a"), voice.synth("bb bb bb"))
    parts = [wavs.decode(base64.b64decode(await heard.get())) for _ in range(6)]
    joined = (wavs.encode(wavs.join(parts[:3])), wavs.encode(wavs.join(parts[3:])))
    assert joined == tuple(wholes)
    await bus.close()
