"""Reads and writes WAV files in memory, and joins parts of speech.

The format: http://soundfile.sapp.org/doc/WaveFormat/ and, for `WAVE_FORMAT_EXTENSIBLE`,
https://learn.microsoft.com/windows/win32/api/mmreg/ns-mmreg-waveformatextensible.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import wave
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.voice import Wav

log = logging.getLogger(__name__)

FADE: Final = 0.005
"""Seconds of fade-in and fade-out of a part."""
_SILENT: Final = 40
"""Loudest sample that still counts as silence."""
_MARGIN: Final = 0.015
"""Seconds of silence that are kept around speech, for soft consonants."""

_EXTENSIBLE: Final = 0xFFFE
_OPEN: Final = 0xFFFF_FFFF
"""The size of a chunk of unknown length."""
_MAX_CHUNKS: Final = 1_000
_MAX_CHANNELS: Final = 1_024
"""libsndfile's maximum."""
_BLOCK: Final = 1 << 16
"""Samples that are converted at a time."""
_NAME: Final = re.compile(rb"[ -~]{4}")
"""A chunk's name."""
_ENCODINGS: Final = {
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
}
"""libsndfile's name for each format tag and number of bytes per sample: PCM and floats."""
_WANTED: Final = "the WAV must hold PCM of 8 to 32 bits or floats of 32 or 64 bits"


def encode(wav: Wav) -> bytes:
    """A WAV file of 16-bit PCM."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(wav.sample_rate)
        writer.writeframes(pcm_bytes(wav))
    return file.getvalue()


def pcm_bytes(wav: Wav) -> bytes:
    """The samples alone, little-endian."""
    return wav.samples.astype("<i2").tobytes()


def open_header(sample_rate: int) -> bytes:
    """The header of a WAV file of unknown length: 16-bit PCM, one channel.

    It has the largest possible sizes, as in a file that is written to a pipe.
    """
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", _OPEN, b"WAVE"),
        *(b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16),
        *(b"data", _OPEN),
    )


def decode(file: bytes) -> Wav:
    """Reads a WAV file and mixes its channels to one.

    Supports PCM of 8 to 32 bits, even if samples use only some of their bits, and floats of 32 and
    64 bits. Supports files that were written to a pipe, whose sizes are wrong, and a last chunk
    that is shorter than its size. Memory stays below the file's size plus twice that of the result
    plus 5 MB.

    libsndfile converts the samples, but this module parses the header. libsndfile would read a data
    chunk of size 0 as empty, miss chunks after an odd one without padding, read 20 bits in 4 bytes
    as 3 bytes, and run any codec that the header names.

    Raises:
        ValueError: the file is not such a WAV; the message is a sentence that does not quote it.
        VoiceUnavailable: libsndfile is not installed.
    """
    soundfile = _soundfile()
    form, data = _format_and_data(file)
    encoding, channels, rate = _read_format(form)
    with soundfile.SoundFile(
        io.BytesIO(data),
        format="RAW",
        subtype=encoding,
        endian="LITTLE",
        channels=channels,
        samplerate=rate,
    ) as source:
        blocks = source.blocks(_BLOCK // channels, always_2d=True)
        mixed = [_mix(block) for block in blocks]
    return Wav(np.concatenate([np.empty(0, np.int16), *mixed]), rate)


def _soundfile() -> Any:
    try:
        import soundfile  # imported only where a WAV is read
    except (ImportError, OSError) as error:
        log.error("libsndfile cannot be loaded: %s", error)
        raise VoiceUnavailable(
            "WAV files cannot be read; install soundfile for this platform, or send no reference.",
            retry_after=60,
        ) from None
    return soundfile


def _mix(block: npt.NDArray[np.float64]) -> npt.NDArray[np.int16]:
    """Mixes frames of samples from -1 to 1 to 16-bit samples of one channel."""
    if not np.isfinite(block).all():
        raise ValueError("the WAV holds samples that are not numbers")
    mixed: npt.NDArray[np.float64] = block.clip(-1, 1).mean(axis=1) * 2**15
    return mixed.clip(max=2**15 - 1).astype(np.int16)


def _format_and_data(file: bytes) -> tuple[bytes, bytes]:
    """The content of the chunks `fmt ` and `data`; if a name repeats, the first one counts."""
    if file[:4] != b"RIFF" or file[8:12] != b"WAVE":
        raise ValueError("this must be a WAV file")
    whole = 8 + int.from_bytes(file[4:8], "little")
    found: dict[bytes, bytes] = {}
    start = 12
    for _ in range(_MAX_CHUNKS):
        if start + 8 > len(file):
            break
        name, size = struct.unpack_from("<4sI", file, start)
        start += 8
        chunk_follows = whole <= len(file) and _NAME.match(file, start, whole)
        if name == b"data" and size == 0 and not chunk_follows:
            # The file was written to a pipe: the samples extend to its end.
            size = len(file)
        end = start + size
        if name in (b"fmt ", b"data"):
            found.setdefault(name, file[start:end])
        # A zero byte follows a chunk of odd size as padding. Some programs omit it.
        start = end + (size % 2 and not _NAME.match(file, end))
    if len(found) < 2:
        raise ValueError("the WAV has no format or no data")
    return found[b"fmt "], found[b"data"]


def _read_format(form: bytes) -> tuple[str, int, int]:
    """libsndfile's name of the encoding, the number of channels, and samples per second."""
    if len(form) < 16:
        raise ValueError("the WAV's format is cut off")
    tag, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", form)
    if tag == _EXTENSIBLE and len(form) >= 26:
        # Its GUID begins with the tag.
        (tag,) = struct.unpack_from("<H", form, 24)
    if tag not in (1, 3):
        raise ValueError(_WANTED)
    if not 1 <= channels <= _MAX_CHANNELS or not 1 <= rate < 1 << 31 or frame % channels:
        raise ValueError("the WAV's format contradicts itself")
    # Samples of fewer bits use the upper bits of their bytes. Those of 17 to 24 bits may use 4
    # bytes.
    size, needed = frame // channels, -(-bits // 8)
    encoding = _ENCODINGS.get((tag, size))
    if encoding is None or (size, needed) not in ((needed, needed), (4, 3)):
        raise ValueError(_WANTED)
    return encoding, channels, rate


def pcm(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Samples from -1 to 1 as 16-bit ones."""
    finite = np.nan_to_num(samples, posinf=1.0, neginf=-1.0)
    return (np.clip(finite, -1.0, 1.0) * 32767).astype(np.int16)


def trim(wav: Wav) -> Wav:
    """The speech without the silence around it; empty if there is only silence."""
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


def resample(wav: Wav, sample_rate: int) -> Wav:
    """The same speech at another sample rate.

    Cuts the spectrum or extends it with zeros (band-limited interpolation by the Fourier transform:
    https://ccrma.stanford.edu/~jos/sasp/Spectral_Interpolation.html). The length is rounded up.
    """
    if wav.sample_rate == sample_rate or not len(wav.samples):
        return Wav(wav.samples, sample_rate)
    common = math.gcd(wav.sample_rate, sample_rate)
    old, new = wav.sample_rate // common, sample_rate // common
    # Pad with silence to a whole number of periods of both rates.
    periods = -(-len(wav.samples) // old)
    spectrum = np.fft.rfft(wav.samples, periods * old)
    changed = np.fft.irfft(spectrum, periods * new) * (new / old)
    length = -(-len(wav.samples) * new // old)
    rounded = changed[:length].round().clip(-(2**15), 2**15 - 1)
    return Wav(rounded.astype(np.int16), sample_rate)


def join(parts: Sequence[Wav]) -> Wav:
    """The parts one after the other; all have the same sample rate."""
    return Wav(np.concatenate([part.samples for part in parts]), parts[0].sample_rate)
