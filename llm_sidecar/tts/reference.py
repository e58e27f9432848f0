"""Decodes and checks the voice sample of a request, in memory only."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.tts import wav
from llm_sidecar.tts.voice import Reference

MAX_REFERENCE_BYTES: Final = 10 << 20
MIN_SECONDS, MAX_SECONDS = 1.0, 30.0
MIN_RATE, MAX_RATE = 8_000, 192_000


def read_reference(encoded: str) -> Reference:
    """Decodes and checks a WAV in base64.

    Raises:
        InvalidRequest: it is not base64, not a WAV, too large, too short or too long, or its sample
            rate is out of range; the error says which.
        VoiceUnavailable: libsndfile is not installed.
    """
    if len(encoded) > (MAX_REFERENCE_BYTES + 2) // 3 * 4:
        raise InvalidRequest(f"ref_wav_b64: the WAV is larger than {MAX_REFERENCE_BYTES} bytes")
    try:
        file = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("ref_wav_b64: this is not base64") from None
    return check_reference(file)


def check_reference(file: bytes) -> Reference:
    """Checks a WAV file.

    Raises:
        InvalidRequest: it is not a WAV, too large, too short or too long, or its sample rate is out
            of range; the error says which.
        VoiceUnavailable: libsndfile is not installed.
    """
    if len(file) > MAX_REFERENCE_BYTES:
        raise InvalidRequest(f"ref_wav_b64: the WAV is larger than {MAX_REFERENCE_BYTES} bytes")
    try:
        samples, rate = wav.decode(file)
    except ValueError as error:
        raise InvalidRequest(f"ref_wav_b64: {error}") from None
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequest(
            f"ref_wav_b64: the WAV needs {MIN_RATE} to {MAX_RATE} samples a second"
        )
    seconds = len(samples) / rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InvalidRequest(
            f"ref_wav_b64: the WAV is {seconds:.2f} s long; "
            f"it takes {MIN_SECONDS:g} to {MAX_SECONDS:g} s"
        )
    return Reference(file, seconds)
