"""The embedded voice: espeak-ng through ctypes, with the library and data of `espeakng-loader`.

The interface: https://github.com/espeak-ng/espeak-ng/blob/1.52.0/src/include/espeak-ng/speak_lib.h
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any, Final

import numpy as np

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts import wav
from llm_sidecar.tts.text import pause_after, split
from llm_sidecar.tts.voice import Reference, Wav

log = logging.getLogger(__name__)

_SYNCHRONOUS: Final = 2
_DO_NOT_EXIT: Final = 0x8000
_BUFFER_MILLISECONDS: Final = 200
_CHARACTERS: Final = 1
_UTF8: Final = 1
"""Without the flags for SSML and phonemes in brackets, everything is plain text."""
_RATE, _RANGE = 1, 4
_LANGUAGE: Final = b"en-us"

_EXAGGERATION: Final = (0.0, 0.5, 2.0)
_WORDS_PER_MINUTE: Final = (155.0, 170.0, 215.0)
_PITCH_RANGE: Final = (0.0, 50.0, 100.0)

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class EspeakVoice:
    """espeak-ng, without weights, many times faster than real time; it cannot clone a voice.

    `exaggeration` sets the pitch range, from 0 (one tone) over 50 (espeak-ng's own, at 0.5) to 100,
    and the rate, from 155 over 170 to 215 words a minute.
    """

    name = "espeak"
    clones = False

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Yields each part once it is spoken, without inaudible parts.

        Raises:
            VoiceUnavailable: the library cannot be loaded.
        """
        parts = split(text)
        for number, part in enumerate(parts, 1):
            pause = pause_after(part) if number < len(parts) else 0.0
            # A cancelled request does not wait for the thread; the next part waits for its lock.
            spoken = await asyncio.to_thread(_speak, part, exaggeration, pause)
            if spoken.samples.size:
                yield spoken

    async def close(self) -> None:
        """Nothing to free: the library belongs to the process."""


def _speak(part: str, exaggeration: float, pause: float) -> Wav:
    rate = round(float(np.interp(exaggeration, _EXAGGERATION, _WORDS_PER_MINUTE)))
    pitch_range = round(float(np.interp(exaggeration, _EXAGGERATION, _PITCH_RANGE)))
    speech = wav.trim(_library.speak(part, rate, pitch_range))
    return wav.soften(speech, pause=pause) if speech.samples.size else speech


class _Library:
    """espeak-ng, whose state is global to the process, so one thread at a time uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: Any = None
        self._sample_rate = 0
        self._chunks: list[bytes] = []
        # Referenced here, because the library keeps only a pointer to it.
        self._callback = _Callback(self._take)

    def speak(self, text: str, rate: int, pitch_range: int) -> Wav:
        """Speaks in this thread, without the GIL."""
        with self._lock:
            espeak = self._load()
            self._chunks.clear()
            espeak.espeak_SetParameter(_RATE, rate, 0)
            espeak.espeak_SetParameter(_RANGE, pitch_range, 0)
            data = text.encode(errors="replace") + b"\0"
            failed = espeak.espeak_Synth(data, len(data), 0, _CHARACTERS, 0, _UTF8, None, None)
            speech = b"".join(self._chunks)
            self._chunks.clear()
        if failed:
            raise VoiceUnavailable(f"The embedded voice failed with code {failed}.", retry_after=1)
        return Wav(np.frombuffer(speech, np.int16), self._sample_rate)

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def _load(self) -> Any:
        if self._handle is None:
            try:
                self._handle = self._loaded()
            except (ImportError, OSError, RuntimeError) as error:
                log.error("espeak-ng cannot be loaded: %s", error)
                raise VoiceUnavailable(
                    "The embedded voice cannot be loaded; install espeakng-loader for this "
                    "platform, or set TTS_VOICE=chatterbox.",
                    retry_after=60,
                ) from None
        return self._handle

    def _loaded(self) -> Any:
        import espeakng_loader  # imported only if this voice speaks

        espeak = ctypes.CDLL(espeakng_loader.get_library_path())
        espeak.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        data = espeakng_loader.get_data_path().encode()
        self._sample_rate = espeak.espeak_Initialize(
            _SYNCHRONOUS, _BUFFER_MILLISECONDS, data, _DO_NOT_EXIT
        )
        if self._sample_rate <= 0:
            raise OSError(f"espeak_Initialize answered {self._sample_rate}")
        espeak.espeak_SetSynthCallback(self._callback)
        if failed := espeak.espeak_SetVoiceByName(_LANGUAGE):
            raise OSError(f"espeak_SetVoiceByName answered {failed}")
        return espeak


_library: Final = _Library()
