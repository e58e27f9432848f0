"""A Piper voice on onnxruntime: VITS, from phonemes to samples.

A voice is two files: `NAME.onnx` with the inputs `input` (the ids of phonemes, of shape (1, n)),
`input_lengths` and `scales` (noise, length, noise of the durations), and `NAME.onnx.json`, which
maps each phoneme to its ids. The ids of a text are those of `^`, then of each phoneme followed by
those of `_`, then those of `$`. The phonemes are espeak-ng's, in the International Phonetic
Alphabet, decomposed (NFD), with the punctuation marks of the text.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from llm_sidecar.errors import VoiceUnavailable, one_line
from llm_sidecar.tts.espeak_library import LIBRARY
from llm_sidecar.tts.piper_messages import Speech
from llm_sidecar.tts.text import clauses, mark_of, phrases
from llm_sidecar.tts.voice import Wav
from llm_sidecar.tts.wav import pcm

_BEGIN, _PAD, _END = "^", "_", "$"
_MARKS: Final = {
    "…": ".",
    "。": ".",
    "！": "!",
    "？": "?",
    "—": ",",
    "–": ",",
    "，": ",",
    "；": ";",
    "：": ":",
    "、": ",",
}
_PHRASE: Final = 120
"""Characters that are spoken at a time, by whole clauses; the memory grows with them."""
_EXAGGERATION: Final = (0.0, 0.5, 2.0)
_LENGTH: Final = (1.2, 1.0, 0.75)
_NOISE: Final = (0.5, 1.0, 1.4)
"""Factors of the voice's own scales."""


class _Audio(msgspec.Struct):
    sample_rate: Annotated[int, msgspec.Meta(ge=8_000, le=192_000)]


class _Espeak(msgspec.Struct):
    voice: str


class _Inference(msgspec.Struct):
    noise_scale: float = 0.667
    length_scale: float = 1.0
    noise_w: float = 0.8


class VoiceConfig(msgspec.Struct):
    """What is read of a voice's JSON file."""

    audio: _Audio
    espeak: _Espeak
    phoneme_id_map: dict[str, list[int]]
    inference: _Inference = msgspec.field(default_factory=_Inference)
    num_speakers: int = 1


class PiperModel:
    """A voice in memory; one thread at a time uses it."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Loads the only voice in a folder.

        Args:
            threads: of onnxruntime.

        Raises:
            VoiceUnavailable: there is no voice, or it does not load; says why.
        """
        model = _find(folder)
        self._config = _read_config(model.with_name(f"{model.name}.json"))
        self._session, self._options = _load(model, threads)

    def speak(self, part: str, exaggeration: float) -> Speech:
        """Speaks a part of a text.

        Raises:
            VoiceUnavailable: espeak-ng cannot be loaded.
        """
        spoken, unknown = [np.empty(0, np.int16)], 0
        for phrase in phrases(part, _PHRASE):
            ids, missing = self.ids(self.phonemes(phrase))
            unknown += missing
            if ids:
                spoken.append(self._infer(ids, exaggeration))
        return Speech(Wav(np.concatenate(spoken), self._config.audio.sample_rate), unknown)

    def phonemes(self, part: str) -> str:
        """The phonemes of a part, with the mark of each clause; empty if nothing is spoken."""
        spoken = []
        for clause in clauses(part):
            sounds = LIBRARY.phonemes(clause, self._config.espeak.voice)
            if sounds:
                mark = mark_of(clause)
                spoken.append(sounds + _MARKS.get(mark, mark))
        return unicodedata.normalize("NFD", " ".join(spoken))

    def ids(self, phonemes: str) -> tuple[list[int], int]:
        """The ids of phonemes, without any if no phoneme is known, and how many are not known."""
        table = self._config.phoneme_id_map
        known = [table[phoneme] for phoneme in phonemes if phoneme in table]
        if not any(map(str.isalpha, phonemes)) or not known:
            return [], len(phonemes) - len(known)
        padded = [number for numbers in known for number in (*numbers, *table[_PAD])]
        return [*table[_BEGIN], *padded, *table[_END]], len(phonemes) - len(known)

    def _infer(self, ids: list[int], exaggeration: float) -> npt.NDArray[np.int16]:
        scales = self._config.inference
        noise = float(np.interp(exaggeration, _EXAGGERATION, _NOISE))
        length = float(np.interp(exaggeration, _EXAGGERATION, _LENGTH))
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(
                [
                    scales.noise_scale * noise,
                    scales.length_scale * length,
                    # Less noise here would shorten the speech too.
                    scales.noise_w,
                ],
                np.float32,
            ),
        }
        if self._config.num_speakers > 1:
            inputs["sid"] = np.zeros(1, np.int64)
        [speech] = self._session.run(None, inputs, self._options)
        return pcm(speech.reshape(-1))


def _find(folder: Path) -> Path:
    models = sorted(folder.glob("*.onnx"))
    if len(models) != 1:
        raise _unusable(folder, f"it holds {len(models)} .onnx files instead of one")
    return models[0]


def _read_config(file: Path) -> VoiceConfig:
    try:
        config = msgspec.json.decode(file.read_bytes(), type=VoiceConfig)
    except OSError as error:
        raise _unusable(file, f"{error.strerror}") from None
    except msgspec.DecodeError as error:
        raise _unusable(file, f"{error}") from None
    missing = [
        phoneme for phoneme in (_BEGIN, _PAD, _END) if not config.phoneme_id_map.get(phoneme)
    ]
    if missing:
        raise _unusable(file, f"it has no ids for {' '.join(missing)}")
    return config


def _load(model: Path, threads: int) -> tuple[Any, Any]:
    """The session, and the options of its runs."""
    import onnxruntime  # only this process imports a runtime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A voice is mostly idle.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    runs = onnxruntime.RunOptions()
    # Without it, the process keeps the most memory that a phrase has ever needed.
    runs.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers), runs
    except Exception as error:  # noqa: BLE001 - the runtime raises bare ones
        raise _unusable(model, one_line(error)) from None


def _unusable(path: Path, reason: str) -> VoiceUnavailable:
    return VoiceUnavailable(f"The Piper voice cannot be used: {path}: {reason}")
