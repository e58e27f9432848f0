"""`python -m tests.chatterbox.in_process FOLDER REDIS_URL TEXT`: speaks in this process.

Writes the SHA-256 of the WAV that `ChatterboxTTS.synth` returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys

from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import ChatterboxTTS
from tests.chatterbox.stand_in import use_few_layers


async def speak(folder: str, redis_url: str, text: str) -> str:
    bus = EventBus(redis_url)
    await bus.connect()
    voice = ChatterboxTTS(folder, "auto", bus)
    try:
        return hashlib.sha256(await voice.synth(text)).hexdigest()
    finally:
        await voice.close()
        await bus.close()


if __name__ == "__main__":
    use_few_layers()
    sys.stdout.write("\n" + asyncio.run(speak(*sys.argv[1:])) + "\n")
