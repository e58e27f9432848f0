"""The voice of espeak-ng, which needs no weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from llm_sidecar.tts.espeak_library import LIBRARY
from llm_sidecar.tts.parts import in_parts
from llm_sidecar.tts.voice import Reference, Wav

_EXAGGERATION: Final = (0.0, 0.5, 2.0)
_WORDS_PER_MINUTE: Final = (155.0, 170.0, 215.0)
_PITCH_RANGE: Final = (0.0, 50.0, 100.0)


class EspeakVoice:
    """espeak-ng in this process, many times faster than real time; it cannot clone a voice.

    `exaggeration` sets the pitch range, from 0 (one tone) over 50 (espeak-ng's own, at 0.5) to 100,
    and the rate, from 155 over 170 to 215 words a minute.
    """

    name = "espeak"
    clones = False
    unavailable: str | None = None

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        """Yields each part once it is spoken, without inaudible parts.

        Raises:
            VoiceUnavailable: the library cannot be loaded.
        """
        rate = round(float(np.interp(exaggeration, _EXAGGERATION, _WORDS_PER_MINUTE)))
        pitch_range = round(float(np.interp(exaggeration, _EXAGGERATION, _PITCH_RANGE)))

        async def spoken(part: str) -> Wav:
            # A cancelled request does not wait for the thread; the next part waits for its lock.
            return await asyncio.to_thread(LIBRARY.speak, part, rate, pitch_range)

        async for speech in in_parts(text, spoken):
            yield speech

    async def close(self) -> None:
        """Nothing to free: the library belongs to the process."""
