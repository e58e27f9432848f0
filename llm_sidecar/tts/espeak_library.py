"""espeak-ng through ctypes, with the library and data of `espeakng-loader`.

The interface: https://github.com/espeak-ng/espeak-ng/blob/1.52.0/src/include/espeak-ng/speak_lib.h
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from typing import Any, Final

import numpy as np

from llm_sidecar.errors import VoiceUnavailable
from llm_sidecar.tts.voice import Wav

log = logging.getLogger(__name__)

_SYNCHRONOUS: Final = 2
_DO_NOT_EXIT: Final = 0x8000
_BUFFER_MILLISECONDS: Final = 200
_CHARACTERS: Final = 1
_UTF8: Final = 1
"""Without the flags for SSML and phonemes in brackets, everything is plain text."""
_IPA: Final = 2
_RATE, _RANGE = 1, 4
ENGLISH: Final = "en-us"

_LETTER_A: Final = re.compile(r"\bA(?= [A-Z]\b)|(?<=\b[A-Z] )A\b")
"""The letter A in a word that is spelled."""

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class EspeakLibrary:
    """espeak-ng, whose state is global to the process: there is one instance, `LIBRARY`, and one
    thread at a time uses it."""

    def __init__(self) -> None:
        """Loads nothing."""
        self._lock = threading.Lock()
        self._handle: Any = None
        self._sample_rate = 0
        self._chunks: list[bytes] = []
        # Referenced here, because the library keeps only a pointer to it.
        self._callback = _Callback(self._take)

    def speak(self, text: str, rate: int, pitch_range: int) -> Wav:
        """Speaks in this thread, without the GIL.

        Args:
            rate: words a minute.
            pitch_range: 0 (one tone) to 100; 50 is the voice's own.

        Raises:
            VoiceUnavailable: the library cannot be loaded, or fails.
        """
        with self._lock:
            espeak = self._load(ENGLISH)
            self._chunks.clear()
            espeak.espeak_SetParameter(_RATE, rate, 0)
            espeak.espeak_SetParameter(_RANGE, pitch_range, 0)
            data = _encoded(text)
            failed = espeak.espeak_Synth(data, len(data), 0, _CHARACTERS, 0, _UTF8, None, None)
            speech = b"".join(self._chunks)
            self._chunks.clear()
        if failed:
            raise VoiceUnavailable(f"The embedded voice failed with code {failed}.", retry_after=1)
        return Wav(np.frombuffer(speech, np.int16), self._sample_rate)

    def phonemes(self, text: str, language: str = ENGLISH) -> str:
        """The pronunciation of a text in the International Phonetic Alphabet, without
        punctuation marks.

        Args:
            language: an espeak-ng voice; the first call sets it for the process.

        Raises:
            VoiceUnavailable: the library cannot be loaded.
        """
        with self._lock:
            espeak = self._load(language)
            # The library moves the pointer behind each clause, and to null behind the last.
            rest = ctypes.c_char_p(_encoded(text))
            clauses = []
            while rest.value is not None:
                spoken = espeak.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA)
                clauses.append((spoken or b"").decode(errors="replace"))
        return " ".join(" ".join(clauses).split())

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def _load(self, language: str) -> Any:
        if self._handle is None:
            try:
                self._handle = self._loaded(language)
            except (ImportError, OSError, RuntimeError) as error:
                log.error("espeak-ng cannot be loaded: %s", error)
                raise VoiceUnavailable(
                    "The embedded voice cannot be loaded; install espeakng-loader for this "
                    "platform, or set TTS_VOICE=chatterbox.",
                    retry_after=60,
                ) from None
        return self._handle

    def _loaded(self, language: str) -> Any:
        import espeakng_loader  # imported only if this library is used

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
        espeak.espeak_TextToPhonemes.restype = ctypes.c_char_p
        espeak.espeak_TextToPhonemes.argtypes = [
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_int,
            ctypes.c_int,
        ]
        data = espeakng_loader.get_data_path().encode()
        self._sample_rate = espeak.espeak_Initialize(
            _SYNCHRONOUS, _BUFFER_MILLISECONDS, data, _DO_NOT_EXIT
        )
        if self._sample_rate <= 0:
            raise OSError(f"espeak_Initialize answered {self._sample_rate}")
        espeak.espeak_SetSynthCallback(self._callback)
        if failed := espeak.espeak_SetVoiceByName(language.encode()):
            raise OSError(f"espeak_SetVoiceByName answered {failed}")
        return espeak


LIBRARY: Final = EspeakLibrary()


def _encoded(text: str) -> bytes:
    """The text for the library, which reads the letter A as an article where it can."""
    return _LETTER_A.sub("eigh", text).encode(errors="replace") + b"\0"
