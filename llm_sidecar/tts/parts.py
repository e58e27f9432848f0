"""Speaks a text part by part: what the embedded voices share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from llm_sidecar.tts import wav
from llm_sidecar.tts.text import pause_after, split
from llm_sidecar.tts.voice import Wav


async def in_parts(text: str, speak: Callable[[str], Awaitable[Wav]]) -> AsyncIterator[Wav]:
    """Yields each part once it is spoken, with soft ends and a pause; leaves out inaudible ones.

    Args:
        speak: speaks one part.
    """
    parts = split(text)
    for number, part in enumerate(parts, 1):
        pause = pause_after(part) if number < len(parts) else 0.0
        speech = wav.trim(await speak(part))
        if speech.samples.size:
            yield wav.soften(speech, pause=pause)
