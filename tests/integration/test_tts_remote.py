"""Speech workers and their sidecars, over an embedded Redis and over a real one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import pytest

from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, QueueFull, VoiceUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.messages import ANNOUNCED, requested
from llm_sidecar.tts.remote import RETRY_AFTER, RemoteVoice
from llm_sidecar.tts.voice import Reference, Wav
from llm_sidecar.tts.worker import SpeechWorker
from tests.redis_server import RedisServer, require_redis

TIMEOUT = 10.0
"""Seconds that a test waits for a condition before it fails."""
RATE = 8_000
TONE = 400
"""Samples of one word."""

names = itertools.count()


class Tones:
    """A voice that speaks each word as a tone: the longer the word, the higher; the more
    exaggeration, the louder.

    Attributes:
        gate: it waits for this event before each word.
        held: the event is cleared before this word.
        begun: words that it has begun to speak.
    """

    name = "tones"
    clones = True
    sample_rate = RATE

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = ""
        self.begun: list[str] = []
        self.given_up = 0

    async def speak(
        self, text: str, *, exaggeration: float, reference: Reference | None
    ) -> AsyncIterator[Wav]:
        ended = False
        try:
            for word in text.split():
                self.begun.append(word)
                if word == self.held:
                    self.gate.clear()
                await self.gate.wait()
                if word == "break":
                    raise RuntimeError(f"a string broke at {text}")
                yield tone(word, exaggeration, reference)
            ended = True
        finally:
            self.given_up += not ended

    async def close(self) -> None:
        pass


def tone(word: str, exaggeration: float = 0.5, reference: Reference | None = None) -> Wav:
    octave = 1 if reference is None else 2
    phase = 2 * np.pi * 100 * octave * len(word) * np.arange(TONE) / RATE
    return Wav((np.sin(phase) * 10_000 * (exaggeration + 0.1)).astype(np.int16), RATE)


class House:
    """Workers and sidecars on one Redis, each with a bus of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._stack = contextlib.AsyncExitStack()

    async def bus(self) -> EventBus:
        bus = EventBus(self.url)
        self._stack.push_async_callback(bus.close)
        await bus.connect()
        return bus

    async def worker(self, voice: Tones | None = None, *, max_waiting: int = 16) -> SpeechWorker:
        worker = SpeechWorker(
            await self.bus(), voice or Tones(), announce_every=0.05, max_waiting=max_waiting
        )
        self._stack.push_async_callback(worker.close)
        await worker.start()
        return worker

    async def sidecar(
        self,
        *,
        alive_for: float = TIMEOUT,
        part_timeout: float = TIMEOUT,
        lost_after: float = TIMEOUT,
    ) -> RemoteVoice:
        voice = RemoteVoice(
            await self.bus(),
            alive_for=alive_for,
            part_timeout=part_timeout,
            lost_after=lost_after,
        )
        self._stack.push_async_callback(voice.close)
        await voice.start()
        return voice

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    url = f"memory://tts-{next(names)}"
    if request.param == "redis":
        url = request.getfixturevalue("server").url
    async with House(url) as house:
        yield house


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


async def say(
    voice: RemoteVoice,
    text: str,
    *,
    exaggeration: float = 0.5,
    reference: Reference | None = None,
) -> list[Wav]:
    async with asyncio.timeout(TIMEOUT):
        spoken = voice.speak(text, exaggeration=exaggeration, reference=reference)
        return [part async for part in spoken]


async def pair(house: House, voice: Tones | None = None) -> tuple[RemoteVoice, SpeechWorker]:
    sidecar, worker = await house.sidecar(), await house.worker(voice)
    await until(lambda: sidecar.available)
    return sidecar, worker


def same(spoken: list[Wav], expected: list[Wav]) -> bool:
    return len(spoken) == len(expected) and all(
        part.sample_rate == other.sample_rate and np.array_equal(part.samples, other.samples)
        for part, other in zip(spoken, expected, strict=True)
    )


async def test_the_parts_come_in_their_order(house: House) -> None:
    sidecar, _ = await pair(house)
    words = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert same(await say(sidecar, " ".join(words)), [tone(word) for word in words])


async def test_a_part_comes_while_the_rest_is_still_to_be_spoken(house: House) -> None:
    voice = Tones()
    sidecar, _ = await pair(house, voice)
    voice.held = "two"
    parts = sidecar.speak("one two three", exaggeration=0.5, reference=None)
    assert same([await anext(parts)], [tone("one")])
    voice.gate.set()
    assert same([part async for part in parts], [tone("two"), tone("three")])


async def test_exaggeration_and_reference_reach_the_voice(house: House) -> None:
    sidecar, _ = await pair(house)
    file = wavs.encode(wavs.join([tone("me")] * round(1.5 * RATE / TONE)))
    reference = Reference(file, 1.5)
    spoken = await say(sidecar, "word", exaggeration=1.7, reference=reference)
    assert same(spoken, [tone("word", 1.7, reference)])


async def test_requests_at_once_are_not_mixed(house: House) -> None:
    await house.worker()
    sidecars = [await house.sidecar(), await house.sidecar()]
    await until(lambda: all(sidecar.available for sidecar in sidecars))
    texts = ["x " * n + "y" * n for n in range(1, 8)]
    spoken = await asyncio.gather(
        *(say(sidecars[n % 2], text) for n, text in enumerate(texts)),
    )
    for text, parts in zip(texts, spoken, strict=True):
        assert same(parts, [tone(word) for word in text.split()])


async def test_two_workers_share_the_work(house: House) -> None:
    voices = [Tones(), Tones()]
    sidecar = await house.sidecar()
    for voice in voices:
        voice.gate.clear()
        await house.worker(voice)
    await until(lambda: len(sidecar.workers()) == 2)
    asking = [asyncio.create_task(say(sidecar, word)) for word in ("one", "three")]
    await until(lambda: all(voice.begun for voice in voices))
    for voice in voices:
        voice.gate.set()
    one, three = await asyncio.gather(*asking)
    assert same(one, [tone("one")])
    assert same(three, [tone("three")])
    # Each text is spoken by one worker: neither by both, nor twice.
    assert sorted(voice.begun for voice in voices) == [["one"], ["three"]]


async def test_a_cancelled_request_is_not_spoken_on(house: House) -> None:
    voice = Tones()
    sidecar, _ = await pair(house, voice)
    voice.gate.clear()
    first = asyncio.create_task(say(sidecar, "first never"))
    await until(lambda: voice.begun)
    second = asyncio.create_task(say(sidecar, "second"))
    third = asyncio.create_task(say(sidecar, "third"))
    await until(lambda: sidecar.workers()[0]["waiting"] == 3)
    second.cancel()
    await until(lambda: sidecar.workers()[0]["waiting"] == 2)
    first.cancel()
    await asyncio.wait([first, second])
    await until(lambda: voice.given_up)
    voice.gate.set()
    assert same(await third, [tone("third")])
    assert voice.begun == ["first", "third"]


async def test_a_request_beyond_the_queues_length_is_refused(house: House) -> None:
    voice = Tones()
    voice.gate.clear()
    sidecar = await house.sidecar()
    await house.worker(voice, max_waiting=2)
    await until(lambda: sidecar.available)
    asking = [asyncio.create_task(say(sidecar, "word")) for _ in range(2)]
    await until(lambda: sidecar.workers()[0]["waiting"] == 2)
    with pytest.raises(QueueFull):
        await say(sidecar, "word")
    voice.gate.set()
    assert all(same(parts, [tone("word")]) for parts in await asyncio.gather(*asking))


async def test_without_a_worker_the_error_names_the_command_to_start_one(house: House) -> None:
    sidecar = await house.sidecar()
    assert not sidecar.available
    with pytest.raises(VoiceUnavailable, match=r"python -m llm_sidecar\.tts") as caught:
        await say(sidecar, "word")
    assert caught.value.retry_after


async def test_a_worker_that_comes_later_is_found(house: House) -> None:
    sidecar = await house.sidecar()
    await house.worker()
    await until(lambda: sidecar.available)
    assert (sidecar.name, sidecar.clones) == ("tones", True)
    assert same(await say(sidecar, "word"), [tone("word")])


async def test_a_worker_that_closes_answers_what_it_has_and_is_gone(house: House) -> None:
    voice = Tones()
    sidecar, worker = await pair(house, voice)
    voice.gate.clear()
    asking = [asyncio.create_task(say(sidecar, "word")) for _ in range(2)]
    await until(lambda: sidecar.workers()[0]["waiting"] == 2)
    await worker.close()
    for asked in asking:
        with pytest.raises(VoiceUnavailable, match="shutting down"):
            await asked
    await until(lambda: not sidecar.available)


async def test_a_worker_that_vanishes_in_the_middle_is_noticed(house: House) -> None:
    voice = Tones()
    sidecar, bus = await house.sidecar(alive_for=1.0), await house.bus()
    worker = SpeechWorker(bus, voice, announce_every=0.05)
    await worker.start()
    await until(lambda: sidecar.available)
    voice.gate.clear()
    asking = asyncio.create_task(say(sidecar, "word"))
    await until(lambda: voice.begun)
    await bus.close()  # as when a process is killed: it does not say goodbye
    with pytest.raises(VoiceUnavailable, match="ended in the middle"):
        await asking
    assert not sidecar.available
    await worker.close()


async def test_a_voice_that_fails_fails_the_request_and_not_the_worker(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    sidecar, _ = await pair(house)
    with pytest.raises(VoiceUnavailable, match="failed"):
        await say(sidecar, "first break")
    assert "the voice failed: RuntimeError" in caplog.text
    assert "first break" not in caplog.text  # what was to be said
    assert same(await say(sidecar, "word"), [tone("word")])


@pytest.mark.parametrize("exaggeration", [-0.1, 2.1, float("inf"), float("nan")])
async def test_an_exaggeration_out_of_range_is_refused(house: House, exaggeration: float) -> None:
    sidecar, _ = await pair(house)
    with pytest.raises(InvalidRequest, match="exaggeration"):
        await say(sidecar, "word", exaggeration=exaggeration)


@pytest.mark.parametrize("text", ["SECRET\0", "SECRET\x85", "SECRET" * 20_000])
async def test_what_is_no_text_is_refused_and_not_quoted(house: House, text: str) -> None:
    sidecar, _ = await pair(house)
    with pytest.raises(InvalidRequest, match=r"^text: ") as caught:
        await say(sidecar, text)
    assert "SECRET" not in caught.value.detail
    assert same(await say(sidecar, "word"), [tone("word")])


async def test_a_reference_that_is_no_wav_is_refused(house: House) -> None:
    sidecar, _ = await pair(house)
    with pytest.raises(InvalidRequest):
        await say(sidecar, "word", reference=Reference(b"RIFF but no WAV", 1.0))


async def test_a_worker_answers_on_no_channel_but_a_sidecars(house: House) -> None:
    sidecar, worker = await pair(house)
    bus, received = await house.bus(), asyncio.Queue[str]()
    await bus.register_listener_queue("phi3.feedback.submitted", received)
    strange = {"request_id": "1", "reply_to": "phi3.feedback.submitted", "text": "word"}
    for payload in (json.dumps({**strange, "exaggeration": 0.5}), "{", "[]", '{"request_id": 1}'):
        assert await bus.publish(requested(worker.worker_id), payload)
    assert same(await say(sidecar, "word"), [tone("word")])
    assert received.empty()


async def test_what_is_no_message_is_refused_counted_and_logged_without_its_content(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    buses = [await house.bus() for _ in range(3)]
    stranger, *ours = buses
    worker, sidecar = SpeechWorker(ours[0], Tones(), announce_every=0.05), RemoteVoice(ours[1])
    await worker.start()
    await sidecar.start()
    try:
        await until(lambda: sidecar.available)
        announcement = {"worker_id": "w", "voice": "SECRET", "clones": False, "waiting": 0}
        for voice in ("SECRET\n", "SECRET\0", "SECRET: 1\r\nX-Y: 2", "", "価格"):
            await stranger.publish(ANNOUNCED, json.dumps(announcement | {"voice": voice}))
        await stranger.publish(ANNOUNCED, "SECRET" * 100_000)
        await until(lambda: ours[1].status()["refused"] == 6)
        # There is no known sender to answer.
        for payload in ("SECRET", '{"request_id": "SECRET\\u0000"}', "SECRET" * 3_000_000):
            await stranger.publish(requested(worker.worker_id), payload)
        await until(lambda: ours[0].status()["refused"] == 3)
        assert [w["voice"] for w in sidecar.workers()] == ["tones"]
        assert same(await say(sidecar, "word"), [tone("word")])
    finally:
        await sidecar.close()
        await worker.close()
    assert caplog.text.count("is refused: ") == 9
    assert "SECRET" not in caplog.text


class Liar:
    """A worker that answers each request as the test says."""

    def __init__(self, bus: EventBus, *answers: dict[str, object]) -> None:
        self._bus = bus
        self._answers = answers

    async def __call__(self, payload: str) -> None:
        request = json.loads(payload)
        for answer in self._answers:
            message = {"request_id": request["request_id"], **answer}
            await self._bus.publish(request["reply_to"], json.dumps(message))

    async def announce(self) -> None:
        await self._bus.subscribe(requested("liar"), self)
        await self.announce_itself()

    async def announce_itself(self) -> None:
        announcement = {"worker_id": "liar", "voice": "lies", "clones": False, "waiting": 0}
        await self._bus.publish(ANNOUNCED, json.dumps(announcement))


def part(index: int, wav: bytes | None = None) -> dict[str, object]:
    file = wavs.encode(tone("word")) if wav is None else wav
    return {"index": index, "wav_b64": base64.b64encode(file).decode()}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([part(0), part(2)], "lost"),
        ([part(1), part(0)], "lost"),
        ([part(0), part(0)], "lost"),
        ([part(0), {"end": 2}], "lost"),
        ([part(0, b"noise"), {"end": 1}], "not a WAV"),
    ],
)
async def test_parts_are_never_joined_in_the_wrong_order(
    house: House, answers: list[dict[str, object]], reason: str
) -> None:
    sidecar = await house.sidecar()
    await Liar(await house.bus(), *answers).announce()
    await until(lambda: sidecar.available)
    with pytest.raises(VoiceUnavailable, match=reason):
        await say(sidecar, "word word word")


@pytest.mark.parametrize("answers", [[], [part(0)]])
async def test_a_lost_message_does_not_block_a_request(
    house: House, answers: list[dict[str, object]]
) -> None:
    sidecar = await house.sidecar(lost_after=0.2)
    liar = Liar(await house.bus(), *answers)
    await liar.announce()
    await until(lambda: sidecar.available)
    asking = asyncio.create_task(say(sidecar, "word word"))
    while not asking.done():
        # It has no request, it says.
        await liar.announce_itself()
        await asyncio.wait([asking], timeout=0.05)
    with pytest.raises(VoiceUnavailable, match="lost") as caught:
        await asking
    assert caught.value.retry_after


async def test_a_long_wait_in_a_workers_queue_is_no_loss(house: House) -> None:
    voice = Tones()
    voice.gate.clear()
    sidecar = await house.sidecar(lost_after=0.1)
    await house.worker(voice)
    await until(lambda: sidecar.available)
    asking = [asyncio.create_task(say(sidecar, "word")) for _ in range(2)]
    await until(lambda: sidecar.workers()[0]["waiting"] == 2)
    await asyncio.wait(asking, timeout=0.5)
    voice.gate.set()
    for asked in asking:
        assert same(await asked, [tone("word")])


async def test_without_redis_no_worker_counts_as_running() -> None:
    require_redis()
    with RedisServer() as server:
        async with House(server.url) as house:
            sidecar, _ = await pair(house)
            server.kill()
            async with asyncio.timeout(2):
                while sidecar.available:
                    await asyncio.sleep(0.005)


async def test_a_part_that_takes_too_long_ends_the_request(house: House) -> None:
    voice = Tones()
    voice.gate.clear()
    sidecar = await house.sidecar(part_timeout=0.2)
    await house.worker(voice)
    await until(lambda: sidecar.available)
    with pytest.raises(DeadlineExceeded) as caught:
        await say(sidecar, "word")
    assert caught.value.retry_after == RETRY_AFTER
    await until(lambda: voice.given_up)


async def test_workers_are_found_once_redis_is_available() -> None:
    require_redis()
    server = RedisServer()
    buses = [EventBus(server.url) for _ in range(2)]
    worker = SpeechWorker(buses[0], Tones(), announce_every=0.05)
    sidecar = RemoteVoice(buses[1])
    try:
        await asyncio.gather(worker.start(), sidecar.start(), *(bus.start() for bus in buses))
        assert not sidecar.available
        server.start()
        await until(lambda: sidecar.available)
        assert same(await say(sidecar, "word"), [tone("word")])
    finally:
        for close in (worker.close, sidecar.close, *(bus.close for bus in buses)):
            await close()
        server.kill()
