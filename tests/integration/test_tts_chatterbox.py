"""Chatterbox where its package is not installed, and the worker's command line."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from llm_sidecar.errors import InvalidRequest, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import ChatterboxTTS
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.__main__ import main
from llm_sidecar.tts.chatterbox import WEIGHTS, ChatterboxVoice
from llm_sidecar.tts.text import split
from llm_sidecar.tts.voice import Wav
from tests.tones import Tones


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with the right file names."""
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


class RecordingPackage:
    """Replaces Chatterbox's package; reads the reference as the package does."""

    conds = t3 = SimpleNamespace(hp=None)
    read: Any = None
    spoken: ClassVar[list[str]] = []

    @classmethod
    def from_local(cls, folder: Path, device: str) -> RecordingPackage:
        return cls()

    def prepare_conditionals(self, file: io.BytesIO) -> None:
        # So does librosa.
        type(self).read = soundfile.read(file, dtype="int16")

    def generate(self, text: str, exaggeration: float) -> Any:
        self.spoken.append(text)
        samples = np.full((1, 2_400), 0.5, np.float32)
        return SimpleNamespace(squeeze=lambda axis: SimpleNamespace(numpy=lambda: samples[axis]))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> type[RecordingPackage]:
    module = ModuleType("chatterbox.tts")
    module.ChatterboxTTS = RecordingPackage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "chatterbox", ModuleType("chatterbox"))
    monkeypatch.setitem(sys.modules, "chatterbox.tts", module)
    RecordingPackage.spoken.clear()
    return RecordingPackage


async def test_a_text_can_be_continued_in_its_middle(
    weights: Path, package: type[RecordingPackage]
) -> None:
    voice = ChatterboxVoice(weights, "cpu")
    speech = voice.speak("Up. Down. Out.", exaggeration=0.5, reference=None, first=1)
    parts = [part async for part in speech]
    await voice.close()
    assert package.spoken == split("Up. Down. Out.")[1:]
    assert len(parts) == len(package.spoken)


async def test_the_package_gets_all_samples_of_a_reference_that_was_written_to_a_pipe(
    weights: Path, package: type[RecordingPackage]
) -> None:
    spoken = np.arange(16_000, dtype=np.int16)
    file = wavs.encode(Wav(spoken, 16_000))
    piped = file[:4] + struct.pack("<I", 0) + file[8:40] + struct.pack("<I", 0) + file[44:]
    voice = ChatterboxTTS(weights, "cpu", EventBus("memory://"))
    await voice.synth("word", ref_wav=piped)
    await voice.close()
    samples, rate = package.read
    assert rate == 16_000
    assert samples.tolist() == spoken.tolist()


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
    bus, received = EventBus("memory://"), asyncio.Queue[str]()
    await bus.connect()
    await bus.register_listener_queue("audio.bytes", received)
    voice = ChatterboxTTS("nowhere", "cpu", bus)
    voice._voice = Tones()  # type: ignore[assignment]
    wholes = await asyncio.gather(voice.synth("a a a"), voice.synth("bb bb bb"))
    parts = [wavs.decode(base64.b64decode(await received.get())) for _ in range(6)]
    joined = (wavs.encode(wavs.join(parts[:3])), wavs.encode(wavs.join(parts[3:])))
    assert joined == tuple(wholes)
    await bus.close()
