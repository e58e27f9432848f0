"""A voice for tests: `python -m tests.tones REDIS_URL HELD` is a speech worker with it.

The worker's process prints each word before it speaks it, and never speaks the word `HELD`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import numpy as np

from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.tts.voice import Reference, Wav
from llm_sidecar.tts.worker import SpeechWorker

RATE = 8_000
TONE = 400
"""Samples of one word."""


class Tones:
    """A voice that speaks each word as a tone: the longer the word, the higher; the more
    exaggeration, the louder.

    Attributes:
        gate: it waits for this event before each word.
        held: the event is cleared before this word.
        begun: words that it has begun to speak.
        given_up: texts that were not spoken to their end.
    """

    name = "tones"
    clones = True

    def __init__(self, held: str = "") -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = held
        self.begun: list[str] = []
        self.given_up = 0

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None, first: int = 0
    ) -> AsyncIterator[Wav]:
        ended = False
        try:
            for word in text.split()[first:]:
                self.begun.append(word)
                if word == self.held:
                    self.gate.clear()
                await self.begin(word)
                if word == "break":
                    raise RuntimeError(f"a string broke at {text}")
                yield tone(word, exaggeration, reference)
            ended = True
        finally:
            self.given_up += not ended

    async def begin(self, word: str) -> None:
        await self.gate.wait()

    async def close(self) -> None:
        pass


def tone(word: str, exaggeration: float = 0.5, reference: Reference | None = None) -> Wav:
    octave = 1 if reference is None else 2
    phase = 2 * np.pi * 100 * octave * len(word) * np.arange(TONE) / RATE
    return Wav((np.sin(phase) * 10_000 * (exaggeration + 0.1)).astype(np.int16), RATE)


class _Told(Tones):
    """Tones that report each word to the parent process."""

    async def begin(self, word: str) -> None:
        sys.stdout.write(f"{word}\n")
        sys.stdout.flush()
        await super().begin(word)


async def _serve(redis_url: str, held: str) -> None:
    worker = SpeechWorker(
        make_client(redis_url), _Told(held), heartbeat_seconds=0.05, stale_after=0.3
    )
    await worker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
