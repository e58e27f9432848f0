"""How well the embedded voices are understood, and how quick they are.

    .venv-bench/bin/python -m benchmarks.speech

Ten sentences are spoken by each voice and recognised by pocketsphinx. Its word error rate compares
voices; it is no measure of what people understand. The first part of a long text is timed from the
request to the WAV on the event bus.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import wav
from llm_sidecar.tts.choice import CheckedVoice
from llm_sidecar.tts.espeak import EspeakVoice
from llm_sidecar.tts.piper import PiperVoice
from llm_sidecar.tts.speaker import Speaker
from llm_sidecar.tts.voice import AUDIO_BYTES, Wav
from llm_sidecar.tts.wording import spoken

SENTENCES: Final = (
    "Raise the stop to 188.42 and keep the target.",
    "Take half of the profit now, because momentum is fading.",
    "The position is up 3.5% since the open.",
    "Volume is twice its average, so the breakout may hold.",
    "Sell the rest at $194.50 before the market closes.",
    "Support at 240 broke, and the next level is 232.",
    "Risk no more than 2% of the account on this trade.",
    "Inflation was 25 bps above the forecast.",
    "Close the short position if the price rises above 61.75.",
    "The trend is over, and the risk is larger than the reward.",
)
LONG: Final = " ".join(SENTENCES * 2)
RECOGNISED_RATE: Final = 16_000
REPETITIONS: Final = 9


def words(text: str) -> list[str]:
    """The words of a text, without marks and in small letters."""
    return re.findall(r"[a-z']+", text.lower())


def word_errors(expected: list[str], heard: list[str]) -> int:
    """The least number of words to change, add and leave out: the Levenshtein distance."""
    previous = list(range(len(heard) + 1))
    for i, word in enumerate(expected, 1):
        current = [i]
        for j, other in enumerate(heard, 1):
            change = previous[j - 1] + (word != other)
            current.append(min(change, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return previous[-1]


def resampled(speech: Wav, rate: int) -> bytes:
    """The samples at another, lower rate: the spectrum is cut off."""
    size = len(speech.samples) * rate // speech.sample_rate
    spectrum = np.fft.rfft(speech.samples.astype(np.float64))[: size // 2 + 1]
    samples = np.fft.irfft(spectrum, size) * size / len(speech.samples)
    return bytes(samples.clip(-32768, 32767).astype("<i2").tobytes())


def recognised(decoder: Any, speech: Wav) -> list[str]:
    decoder.start_utt()
    decoder.process_raw(resampled(speech, RECOGNISED_RATE), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return [] if heard is None else words(heard.hypstr)


def memory(pid: int | str) -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    [kilobytes] = re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(kilobytes) / 1024


def processor_time(*pids: int) -> float:
    """Seconds that processes have computed."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field) for each in fields for field in each[11:13]) / os.sysconf("SC_CLK_TCK")


async def first_part(voice: CheckedVoice, *pids: int) -> tuple[float, float]:
    """Milliseconds from the request to the first WAV on the bus: elapsed, and computed by the
    processes of the voice."""
    bus = EventBus("memory://")
    await bus.start()
    queue: asyncio.Queue[str] = asyncio.Queue()
    await bus.register_listener_queue(AUDIO_BYTES, queue)
    began, computed = time.perf_counter(), processor_time(*pids)
    speaking = asyncio.create_task(Speaker(bus, [voice]).speak(LONG))
    await queue.get()
    taken, computed = time.perf_counter() - began, processor_time(*pids) - computed
    speaking.cancel()
    await asyncio.wait([speaking])
    await bus.close()
    # The voice still speaks its current part.
    await speech_of(voice, "Done.")
    return 1000 * taken, 1000 * computed


async def speech_of(voice: CheckedVoice, text: str) -> Wav:
    parts = voice.speak(text, exaggeration=0.5, reference=None)
    return wav.join([part async for part in parts])


async def word_error_rate(voice: CheckedVoice, decoder: Any) -> float:
    """Prints what is measured of a voice; returns its word error rate."""
    await speech_of(voice, "Warm up.")
    errors = total = 0
    seconds = taken = 0.0
    for sentence in SENTENCES:
        began = time.perf_counter()
        speech = await speech_of(voice, sentence)
        taken += time.perf_counter() - began
        seconds += len(speech.samples) / speech.sample_rate
        expected = words(spoken(sentence))
        errors += word_errors(expected, recognised(decoder, speech))
        total += len(expected)
    pids = [os.getpid()]
    if isinstance(voice, PiperVoice) and voice._process is not None:
        pids.append(voice._process.process.pid)
    starts = [await first_part(voice, *pids) for _ in range(REPETITIONS)]
    elapsed, computed = (sorted(times) for times in zip(*starts, strict=True))
    print(
        f"{voice.name}: word error rate {errors / total:.3f} ({errors} of {total} words),"
        f" {taken / seconds:.3f} of real time, first part after {elapsed[REPETITIONS // 2]:.0f} ms"
        f" ({elapsed[0]:.0f} to {elapsed[-1]:.0f}) with {computed[REPETITIONS // 2]:.0f} ms of work"
    )
    return errors / total


async def main() -> None:
    from pocketsphinx import Decoder  # the tests of this module run without it

    decoder = Decoder(loglevel="FATAL")
    before = memory("self")
    espeak, piper = EspeakVoice(), PiperVoice()
    rates = [await word_error_rate(voice, decoder) for voice in (espeak, piper)]
    print(f"Piper has {rates[1] / rates[0]:.2f} of the word errors of espeak-ng.")
    print(f"This process: {before:.0f} MiB before, {memory('self'):.0f} MiB after.")
    assert piper._process is not None
    print(f"Piper's process: {memory(piper._process.process.pid):.0f} MiB.")
    await piper.close()


if __name__ == "__main__":
    asyncio.run(main())
