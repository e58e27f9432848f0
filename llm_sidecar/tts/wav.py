"""WAV files in memory, and how parts of speech are joined.

The format: http://soundfile.sapp.org/doc/WaveFormat/ and, for `WAVE_FORMAT_EXTENSIBLE`,
https://learn.microsoft.com/windows/win32/api/mmreg/ns-mmreg-waveformatextensible.
"""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llm_sidecar.tts.voice import Wav

FADE: Final = 0.005
"""Seconds in which a part's loudness rises at its start and falls at its end."""
_SILENT: Final = 40
"""Loudest sample that still counts as silence."""
_MARGIN: Final = 0.015
"""Seconds of it that stay around speech, for soft consonants."""

_EXTENSIBLE: Final = 0xFFFE


def encode(wav: Wav) -> bytes:
    """A WAV file of 16-bit PCM."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(wav.sample_rate)
        writer.writeframes(wav.samples.astype("<i2").tobytes())
    return file.getvalue()


def decode(file: bytes) -> Wav:
    """Reads a WAV file, its channels mixed to one.

    Takes what recorders write: PCM of 8, 16, 24 and 32 bits, floats of 32 and 64, and a last chunk
    that is shorter than it says.

    Raises:
        ValueError: it is no such file; the message goes on after "the WAV".
    """
    chunks = dict(_chunks(file))
    if b"fmt " not in chunks or b"data" not in chunks:
        raise ValueError("has no format or no data")
    layout = chunks[b"fmt "]
    if len(layout) < 16:
        raise ValueError("has a format that is cut off")
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", layout[:16])
    if kind == _EXTENSIBLE and len(layout) >= 26:
        kind = struct.unpack("<H", layout[24:26])[0]
    if not channels or not rate or block * 8 != channels * bits:
        raise ValueError("has a format that contradicts itself")
    data = chunks[b"data"]
    frames = len(data) // block
    samples = _as_float(data[: frames * block], kind, bits).reshape(frames, channels)
    mixed = np.clip(samples.mean(axis=1) * 32768.0, -32768, 32767)
    return Wav(mixed.astype(np.int16), rate)


def _chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every chunk's name and content, last to first: where a name repeats the first one counts."""
    if file[:4] != b"RIFF" or file[8:12] != b"WAVE":
        raise ValueError("does not begin as a WAV does")
    found: list[tuple[bytes, bytes]] = []
    at = 12
    while at + 8 <= len(file):
        name, size = struct.unpack("<4sI", file[at : at + 8])
        found.append((name, file[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return reversed(found)


def _as_float(data: bytes, kind: int, bits: int) -> npt.NDArray[np.floating[Any]]:
    """Samples from -1 to 1; format 1 is PCM, 3 floats."""
    match kind, bits:
        case (1, 8):
            return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 2**7
        case (1, 16):
            return np.frombuffer(data, "<i2").astype(np.float32) / 2**15
        case (1, 24):
            # The three bytes become the upper ones of four, which keeps the sign.
            wide = np.zeros((len(data) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            return wide.view("<i4").reshape(-1).astype(np.float32) / 2**31
        case (1, 32):
            return np.frombuffer(data, "<i4").astype(np.float32) / 2**31
        case (3, 32) | (3, 64):
            samples = np.frombuffer(data, f"<f{bits // 8}")
            if not np.isfinite(samples).all():
                raise ValueError("holds samples that are no numbers")
            return samples
    raise ValueError(f"has {bits}-bit samples of format {kind}; send 16-bit PCM")


def trim(wav: Wav) -> Wav:
    """Without the silence around the speech; empty where there is nothing else."""
    loud = np.flatnonzero(np.abs(wav.samples.astype(np.int32)) > _SILENT)
    if not loud.size:
        return Wav(wav.samples[:0], wav.sample_rate)
    margin = int(_MARGIN * wav.sample_rate)
    return Wav(wav.samples[max(0, loud[0] - margin) : loud[-1] + 1 + margin], wav.sample_rate)


def soften(wav: Wav, *, pause: float) -> Wav:
    """Fades the ends, so that parts join without a click, and appends seconds of silence."""
    samples = wav.samples.astype(np.float32)
    length = min(int(FADE * wav.sample_rate), len(samples) // 2)
    ramp = np.linspace(0.0, 1.0, length, dtype=np.float32)
    samples[:length] *= ramp
    samples[len(samples) - length :] *= ramp[::-1]
    silence = np.zeros(int(pause * wav.sample_rate), np.int16)
    return Wav(np.concatenate([samples.astype(np.int16), silence]), wav.sample_rate)


def join(parts: Sequence[Wav]) -> Wav:
    """One after the other; all have the same rate."""
    return Wav(np.concatenate([part.samples for part in parts]), parts[0].sample_rate)
