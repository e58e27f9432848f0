"""Speech workers and their sidecars, over a real Redis."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, QueueFull, VoiceUnavailable
from llm_sidecar.event_bus import redis_url
from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.tts import remote, speech_stream
from llm_sidecar.tts import wav as wavs
from llm_sidecar.tts.__main__ import _serve
from llm_sidecar.tts.answers import RETRY_AFTER
from llm_sidecar.tts.remote import RemoteVoice
from llm_sidecar.tts.speech_stream import GROUP, STREAM, WORKERS, Requests, Work, key_of
from llm_sidecar.tts.voice import Reference, Wav
from llm_sidecar.tts.worker import MOST_DELIVERIES, SpeechWorker
from tests.live_server import ROOT
from tests.redis_server import RedisServer, require_redis
from tests.tones import RATE, TONE, Tones, tone

TIMEOUT = 10.0
"""Seconds that a test waits for a condition before it fails."""
STALE = 0.3


class House:
    """Workers and sidecars on one Redis, each with a client of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = make_client(url)
        self._stack = contextlib.AsyncExitStack()
        self._stack.push_async_callback(self.redis.aclose)

    async def worker(
        self, voice: Tones | None = None, *, heartbeat_seconds: float = 0.05
    ) -> SpeechWorker:
        client = make_client(self.url)
        self._stack.push_async_callback(client.aclose)
        worker = SpeechWorker(
            client, voice or Tones(), heartbeat_seconds=heartbeat_seconds, stale_after=STALE
        )
        self._stack.push_async_callback(worker.close)
        await worker.start()
        return worker

    async def process(self, held: str) -> asyncio.subprocess.Process:
        """A worker in its own process, which prints each word before it speaks it."""
        worker = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "tests.tones", self.url, held],
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        self._stack.push_async_callback(worker.wait)
        self._stack.callback(kill, worker)
        return worker

    async def sidecar(
        self, *, part_timeout: float = TIMEOUT, gone_after: float = TIMEOUT
    ) -> RemoteVoice:
        voice = RemoteVoice(
            make_client(self.url),
            part_timeout=part_timeout,
            gone_after=gone_after,
            look_every=0.02,
        )
        self._stack.push_async_callback(voice.close)
        await voice.start()
        return voice

    async def pair(self, voice: Tones | None = None) -> tuple[RemoteVoice, SpeechWorker]:
        sidecar, worker = await self.sidecar(), await self.worker(voice)
        await until(lambda: sidecar.unavailable is None)
        return sidecar, worker

    async def work(self, stale_after: float = STALE) -> Work:
        """The worker's side of the stream of requests, after one heartbeat."""
        work = Work(self.redis, stale_after)
        await work.show()
        return work

    async def is_empty(self) -> bool:
        """Whether no request is left in Redis."""
        pending = await self.redis.xpending_range(STREAM, GROUP, "-", "+", 1)
        keys = await self.redis.keys("osiris.speech.request.*")
        return not (keys or pending or await self.redis.xlen(STREAM))

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


def kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture(autouse=True)
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_stream, "BLOCK", 0.1)


@pytest.fixture
async def house(server: RedisServer) -> AsyncIterator[House]:
    async with House(server.url) as house:
        await house.redis.flushall()
        yield house


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


async def until_empty(house: House) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not await house.is_empty():
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


def same(spoken: list[Wav], expected: list[Wav]) -> bool:
    return len(spoken) == len(expected) and all(
        part.sample_rate == other.sample_rate and np.array_equal(part.samples, other.samples)
        for part, other in zip(spoken, expected, strict=True)
    )


def tones(text: str) -> list[Wav]:
    return [tone(word) for word in text.split()]


# A text


async def test_the_parts_come_in_their_order_and_nothing_stays_in_redis(house: House) -> None:
    sidecar, _ = await house.pair()
    assert same(await say(sidecar, "a bb ccc dddd eeeee"), tones("a bb ccc dddd eeeee"))
    assert await house.is_empty()


async def test_a_part_comes_while_the_rest_is_still_to_be_spoken(house: House) -> None:
    voice = Tones(held="two")
    sidecar, _ = await house.pair(voice)
    parts = sidecar.speak("one two three", exaggeration=0.5, reference=None)
    assert same([await anext(parts)], tones("one"))
    await until(lambda: "two" in voice.begun)
    voice.gate.set()
    assert same([part async for part in parts], tones("two three"))


async def test_exaggeration_and_reference_reach_the_voice(house: House) -> None:
    sidecar, _ = await house.pair()
    file = wavs.encode(wavs.join([tone("me")] * round(1.5 * RATE / TONE)))
    reference = Reference(file, 1.5)
    spoken = await say(sidecar, "word", exaggeration=1.7, reference=reference)
    assert same(spoken, [tone("word", 1.7, reference)])


@pytest.mark.parametrize("exaggeration", [-0.1, 2.1, float("inf"), float("nan")])
async def test_an_exaggeration_out_of_range_is_refused(house: House, exaggeration: float) -> None:
    sidecar, _ = await house.pair()
    with pytest.raises(InvalidRequest, match="exaggeration"):
        await say(sidecar, "word", exaggeration=exaggeration)


@pytest.mark.parametrize("text", ["SECRET\0", "SECRET\x85", "SECRET" * 20_000])
async def test_what_is_no_text_is_refused_and_not_quoted(house: House, text: str) -> None:
    sidecar, _ = await house.pair()
    with pytest.raises(InvalidRequest, match=r"^text: ") as caught:
        await say(sidecar, text)
    assert "SECRET" not in caught.value.detail
    assert same(await say(sidecar, "word"), tones("word"))


async def test_a_reference_that_is_no_wav_is_refused(house: House) -> None:
    sidecar, _ = await house.pair()
    with pytest.raises(InvalidRequest, match=r"^ref_wav_b64: "):
        await say(sidecar, "word", reference=Reference(b"RIFF but no WAV", 1.0))


async def test_a_voice_that_fails_fails_the_request_and_not_the_worker(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    sidecar, _ = await house.pair()
    with pytest.raises(VoiceUnavailable, match=r"^the voice failed: see the worker's log$"):
        await say(sidecar, "first break")
    assert "the voice failed: RuntimeError" in caplog.text
    assert "first break" not in caplog.text  # the text of the request
    assert same(await say(sidecar, "word"), tones("word"))


# Several workers and sidecars


async def test_two_sidecars_and_two_workers_share_the_texts(house: House) -> None:
    voices = [Tones(), Tones()]
    for voice in voices:
        await house.worker(voice)
    sidecars = [await house.sidecar(), await house.sidecar()]
    await until(lambda: all(len(sidecar.workers()) == 2 for sidecar in sidecars))
    texts = ["x " * n + "y" * n for n in range(1, 9)]
    spoken = await asyncio.gather(*(say(sidecars[n % 2], text) for n, text in enumerate(texts)))
    for text, parts in zip(texts, spoken, strict=True):
        assert same(parts, tones(text))
    # Each text is spoken once.
    assert sum(len(voice.begun) for voice in voices) == sum(len(text.split()) for text in texts)


async def test_each_of_two_workers_speaks_a_text_at_the_same_time(house: House) -> None:
    voices = [Tones(held="one"), Tones(held="one")]
    for voice in voices:
        await house.worker(voice)
    sidecar = await house.sidecar()
    await until(lambda: len(sidecar.workers()) == 2)
    asking = [asyncio.create_task(say(sidecar, "one")) for _ in range(2)]
    await until(lambda: [voice.begun for voice in voices] == [["one"], ["one"]])
    for voice in voices:
        voice.gate.set()
    for asked in asking:
        assert same(await asked, tones("one"))


async def test_a_text_beyond_the_queues_length_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_WAITING", 2)
    voice = Tones(held="word")
    sidecar, _ = await house.pair(voice)
    asking = [asyncio.create_task(say(sidecar, "word")) for _ in range(2)]
    await until(lambda: sidecar.queued == 2)
    with pytest.raises(QueueFull, match=r"^the queue of the speech workers is full$"):
        await say(sidecar, "word")
    voice.held = ""
    voice.gate.set()
    for asked in asking:
        assert same(await asked, tones("word"))


async def test_a_worker_stops_a_cancelled_text(house: House) -> None:
    voice = Tones(held="first")
    sidecar, _ = await house.pair(voice)
    first = asyncio.create_task(say(sidecar, "first never"))
    await until(lambda: voice.begun)
    second = asyncio.create_task(say(sidecar, "second"))
    third = asyncio.create_task(say(sidecar, "third"))
    await until(lambda: sidecar.queued == 3)
    second.cancel()
    await until(lambda: sidecar.queued == 2)
    first.cancel()
    await asyncio.wait([first, second])
    await until(lambda: voice.given_up)
    voice.gate.set()
    assert same(await third, tones("third"))
    assert voice.begun == ["first", "third"]
    assert await house.is_empty()


async def test_a_worker_stops_the_text_of_a_dead_sidecar(house: House) -> None:
    voice = Tones(held="first")
    await house.worker(voice)
    requests = Requests(house.redis)
    message = json.dumps({"text": "first never", "exaggeration": 0.5})
    dead = [await requests.add(message) for _ in range(2)]
    await until(lambda: voice.begun)
    for asked in dead:
        assert 0 < await house.redis.ttl(asked.key) <= speech_stream.REQUEST_TTL
        await house.redis.delete(asked.key)  # as when it expires
    await until(lambda: voice.given_up)
    await until_empty(house)
    assert voice.begun == ["first"]


# Workers come and go


async def test_without_a_worker_the_error_names_the_command_to_start_one(house: House) -> None:
    sidecar = await house.sidecar()
    with pytest.raises(VoiceUnavailable, match=r"python -m llm_sidecar\.tts") as caught:
        await say(sidecar, "word")
    assert caught.value.retry_after == RETRY_AFTER


async def test_a_worker_that_comes_later_is_found_and_one_that_ends_is_gone(house: House) -> None:
    sidecar = await house.sidecar()
    worker = await house.worker()
    await until(lambda: sidecar.unavailable is None)
    (shown,) = sidecar.workers()
    assert shown["worker_id"] == worker.worker_id
    assert same(await say(sidecar, "word"), tones("word"))
    await worker.close()
    await until(lambda: sidecar.unavailable is not None)
    assert sidecar.workers() == []


async def test_only_workers_with_a_recent_heartbeat_count(house: House) -> None:
    now = time.time()
    shown = {"alive": now, "dead": now - 60, "from-the-future": now + 60, "two\nlines": now}
    await house.redis.zadd(WORKERS, {**shown, "long" * 33: now})
    workers, _ = await Requests(house.redis).overview()
    assert workers == {"alive": pytest.approx(0, abs=2)}


async def test_workers_forget_those_that_are_long_dead(house: House) -> None:
    await house.redis.zadd(WORKERS, {"dead": time.time() - 100})
    await house.worker()
    async with asyncio.timeout(TIMEOUT):
        while "dead" in await house.redis.zrange(WORKERS, 0, -1):
            await asyncio.sleep(0.005)


async def test_a_worker_that_closes_hands_its_text_to_another_one(house: House) -> None:
    voices = [Tones(held="two"), Tones()]
    sidecar, worker = await house.pair(voices[0])
    asking = asyncio.create_task(say(sidecar, "one two three"))
    await until(lambda: voices[0].begun == ["one", "two"])
    await house.worker(voices[1])
    await worker.close()
    assert same(await asking, tones("one two three"))
    assert voices[1].begun == ["two", "three"]
    assert await house.is_empty()


class LoadedTones(Tones):
    """Tones for the worker's program.

    Attributes:
        closed: the program has closed it.
    """

    closed = False

    async def load(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True


async def test_a_signal_ends_the_workers_program_in_the_middle_of_a_text(house: House) -> None:
    sidecar, voice = await house.sidecar(), LoadedTones(held="two")
    program = asyncio.create_task(_serve(make_client(house.url), voice))  # type: ignore[arg-type]
    await until(lambda: sidecar.unavailable is None)
    asking = asyncio.create_task(say(sidecar, "one two"))
    await until(lambda: voice.begun == ["one", "two"])
    os.kill(os.getpid(), signal.SIGTERM)
    await program
    assert (voice.given_up, voice.closed) == (1, True)
    await until(lambda: not sidecar.workers())
    await house.worker()
    assert same(await asking, tones("one two"))


async def test_the_text_of_the_last_worker_fails_when_it_closes(house: House) -> None:
    voice = Tones(held="word")
    sidecar, worker = await house.sidecar(gone_after=0.1), await house.worker(voice)
    await until(lambda: sidecar.unavailable is None)
    asking = asyncio.create_task(say(sidecar, "word"))
    await until(lambda: voice.begun)
    await worker.close()
    with pytest.raises(VoiceUnavailable, match=r"ended in the middle of a text\.$") as caught:
        await asking
    assert caught.value.retry_after == RETRY_AFTER
    assert await house.is_empty()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
async def test_another_worker_continues_the_text_of_one_that_is_killed_or_hangs(
    house: House, ending: signal.Signals
) -> None:
    sidecar, process = await house.sidecar(), await house.process(held="three")
    await until(lambda: sidecar.unavailable is None)
    asking = asyncio.create_task(say(sidecar, "one two three four"))
    assert process.stdout is not None
    assert [await process.stdout.readline() for _ in range(3)] == [b"one\n", b"two\n", b"three\n"]
    process.send_signal(ending)
    voice = Tones()
    await house.worker(voice)
    assert same(await asking, tones("one two three four"))
    assert voice.begun == ["three", "four"]
    if ending is signal.SIGSTOP:
        process.send_signal(signal.SIGCONT)  # it has lost its claim
        assert same(await say(sidecar, "five"), tones("five"))
    assert await house.is_empty()


async def test_a_worker_that_has_lost_its_claim_neither_keeps_it_nor_hands_it_back(
    house: House,
) -> None:
    work = await house.work(stale_after=0.0)
    await Requests(house.redis).add("{}")
    first, second = await work.take(), await work.take()
    assert first is not None
    assert second is not None
    assert (first.entry, first.deliveries, second.deliveries) == (second.entry, 1, 2)
    assert not await work.keep(first)
    await work.hand_back(first)
    assert await work.keep(second)
    await work.hand_back(second)
    third = await work.take()
    assert third is not None
    assert third.deliveries == 2  # handing back is no failure


async def test_a_worker_that_has_lost_its_text_does_not_fail_it(house: House) -> None:
    voice = Tones(held="break")
    sidecar, worker = await house.sidecar(), await house.worker(voice, heartbeat_seconds=TIMEOUT)
    await until(lambda: sidecar.unavailable is None)
    asking = asyncio.create_task(say(sidecar, "break"))
    await until(lambda: voice.begun)
    work = await house.work(stale_after=0.0)
    taken = await work.take()
    assert taken is not None
    voice.gate.set()
    await until(lambda: worker._speaking is None)
    await work.answer(taken, part(0, "break"))
    await work.finish(taken, '{"end": 1}')
    assert same(await asking, tones("break"))


async def test_a_text_that_crashes_its_workers_fails(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    work, sidecar = await house.work(stale_after=0.0), await house.sidecar()
    await until(lambda: sidecar.unavailable is None)
    asking = asyncio.create_task(say(sidecar, "poison"))
    for _ in range(MOST_DELIVERIES):
        assert await work.take() is not None
    voice = Tones()
    await house.worker(voice)
    with pytest.raises(VoiceUnavailable, match=r"^3 speech workers ended while they spoke this$"):
        await asking
    assert voice.begun == []
    assert "a request is given up" in caplog.text
    assert "poison" not in caplog.text
    assert await house.is_empty()


# Wrong answers and none


async def lie(house: House, sidecar: RemoteVoice, text: str, *messages: str) -> list[Wav]:
    """Requests a speech from a worker that answers with these messages."""
    work = await house.work()
    await until(lambda: sidecar.workers())
    asking = asyncio.create_task(say(sidecar, text))
    taken = None
    while taken is None:
        taken = await work.take()
    for message in messages:
        await work.answer(taken, message)
    return await asking


def part(index: int, word: str = "word") -> str:
    file = wavs.encode(tone(word))
    return json.dumps({"index": index, "wav_b64": base64.b64encode(file).decode()})


async def test_a_part_that_two_workers_have_sent_is_heard_once(house: House) -> None:
    sidecar = await house.sidecar()
    messages = [part(0, "a"), part(1, "bb"), part(0, "a"), part(1, "bb"), '{"end": 2}']
    assert same(await lie(house, sidecar, "a bb", *messages), tones("a bb"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (["SECRET"], "it is not a message"),
        ([part(0), part(2)], "a part is missing"),
        ([part(0), part(1), part(2)], "there are more parts than the text has characters"),
    ],
)
async def test_workers_with_wrong_answers_are_not_used_for_a_while(
    house: House,
    messages: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "SUSPENSION_SECONDS", 0.2)
    sidecar = await house.sidecar()
    with pytest.raises(VoiceUnavailable, match=rf"^A speech worker answered wrongly: {reason}.$"):
        await lie(house, sidecar, "no", *messages)
    with pytest.raises(VoiceUnavailable, match="not used"):
        await say(sidecar, "word")
    assert await house.is_empty()
    assert f"not used for 0 s: an answer is wrong: {reason}" in caplog.text
    assert "SECRET" not in caplog.text
    await house.worker()
    await until(lambda: sidecar.unavailable is None)
    assert same(await say(sidecar, "word"), tones("word"))


async def test_after_a_part_that_takes_too_long_no_worker_is_used(
    house: House,
) -> None:
    voice = Tones(held="word")
    sidecar = await house.sidecar(part_timeout=0.2)
    await house.worker(voice)
    await until(lambda: sidecar.unavailable is None)
    with pytest.raises(DeadlineExceeded, match="spoke no further part of the text") as caught:
        await say(sidecar, "word")
    assert caught.value.retry_after == RETRY_AFTER
    assert "not used" in str(sidecar.unavailable)
    await until(lambda: voice.given_up)


async def test_workers_that_begin_no_text_are_not_used(house: House) -> None:
    await house.work()
    sidecar = await house.sidecar(part_timeout=0.2)
    await until(lambda: sidecar.unavailable is None)
    with pytest.raises(DeadlineExceeded, match="spoke no further part of the text"):
        await say(sidecar, "word")
    assert "not used" in str(sidecar.unavailable)


async def test_workers_that_are_busy_with_other_texts_are_still_used(house: House) -> None:
    voice = Tones(held="word")
    sidecar, other = await house.sidecar(part_timeout=0.2), await house.sidecar()
    await house.worker(voice)
    await until(lambda: sidecar.unavailable is None and other.unavailable is None)
    asking = asyncio.create_task(say(other, "word"))
    await until(lambda: voice.begun)
    with pytest.raises(DeadlineExceeded, match="were busy with other texts"):
        await say(sidecar, "word")
    assert sidecar.unavailable is None
    voice.gate.set()
    assert same(await asking, tones("word"))


async def test_invalid_requests_are_refused_and_removed(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    for field, value in (("no", "id"), ("id", "SECRET"), ("id", "0" * 32), ("id", "1" * 32)):
        await house.redis.xadd(STREAM, {field: value})
    await house.redis.xadd(key_of("1" * 32), {"data": "SECRET"})
    keys = set(await house.redis.keys())
    sidecar, _ = await house.pair()
    assert same(await say(sidecar, "word"), tones("word"))
    assert set(await house.redis.keys()) == keys | {WORKERS}
    answer = str((await house.redis.xrevrange(key_of("1" * 32), count=1))[0][1]["data"])  # type: ignore[index]
    assert json.loads(answer)["kind"] == "InvalidRequest"
    assert await house.redis.xlen(STREAM) == 0
    assert caplog.text.count("it has no request id") == 2
    assert "SECRET" not in caplog.text + answer


# Redis comes and goes


async def test_workers_are_found_once_redis_is_available() -> None:
    require_redis()
    server = RedisServer()
    async with House(server.url) as house:
        sidecar, _ = await house.sidecar(), await house.worker()
        await until(lambda: sidecar.unavailable == remote._AWAY)
        server.start()
        try:
            await until(lambda: sidecar.unavailable is None)
            assert same(await say(sidecar, "word"), tones("word"))
            server.kill()
            await until(lambda: sidecar.unavailable == remote._AWAY)
            with pytest.raises(VoiceUnavailable, match=r"^Redis does not answer"):
                await say(sidecar, "word")
        finally:
            server.kill()


async def test_a_text_goes_on_after_a_restart_of_a_redis_that_keeps_it(tmp_path: Path) -> None:
    require_redis()
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path)]
    voice = Tones(held="two")
    with RedisServer(*durable) as server:
        async with House(server.url) as house:
            sidecar, _ = await house.pair(voice)
            asking = asyncio.create_task(say(sidecar, "one two three"))
            await until(lambda: voice.begun == ["one", "two"])
            server.kill()
            await until(lambda: sidecar.unavailable is not None)
            server.start()
            voice.gate.set()
            assert same(await asking, tones("one two three"))
            assert await house.is_empty()


async def test_a_text_that_redis_lost_fails_at_once() -> None:
    require_redis()
    voice = Tones(held="two")
    with RedisServer() as server:
        async with House(server.url) as house:
            sidecar, _ = await house.pair(voice)
            asking = asyncio.create_task(say(sidecar, "one two three"))
            await until(lambda: voice.begun == ["one", "two"])
            server.kill()
            server.start()
            with pytest.raises(VoiceUnavailable, match=r"^Redis no longer has the text"):
                await asking
            await until(lambda: voice.given_up)
            voice.gate.set()
            await until(lambda: sidecar.unavailable is None)
            assert same(await say(sidecar, "word"), tones("word"))


async def test_a_redis_that_hangs_in_the_middle_of_a_text_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_redis()
    monkeypatch.setattr(redis_url, "REPLY_TIMEOUT", 0.2)
    monkeypatch.setattr(speech_stream, "BLOCK", 0.05)
    voice = Tones(held="word")
    with RedisServer() as server:
        async with House(server.url) as house:
            sidecar, _ = await house.sidecar(gone_after=0.5), await house.worker(voice)
            await until(lambda: sidecar.unavailable is None)
            asking = asyncio.create_task(say(sidecar, "word"))
            await until(lambda: voice.begun)
            server.freeze()
            with pytest.raises(VoiceUnavailable, match=r"^Redis does not answer"):
                await asking
            server.thaw()


async def test_a_redis_that_denies_the_keys_is_named(house: House) -> None:
    await house.redis.acl_setuser(
        "bus", enabled=True, nopass=True, keys=["other"], commands=["+@all"]
    )
    denied = RemoteVoice(make_client(house.url.replace("//", "//bus:any@")), look_every=0.02)
    await denied.start()
    try:
        await until(lambda: denied.unavailable == remote._DENIED)
    finally:
        await denied.close()
        await house.redis.acl_deluser("bus")


async def test_something_else_at_redis_address_is_no_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def say_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            writer.write(b"+OK\r\n" * 3)
        writer.close()

    async with await asyncio.start_server(say_ok, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        sidecar = RemoteVoice(make_client(f"redis://127.0.0.1:{port}/0"), look_every=0.01)
        await sidecar.start()
        await until(lambda: sidecar.unavailable == remote._AWAY)
        await asyncio.sleep(0.1)
        await sidecar.close()
    assert caplog.text.count("no speech worker can be used") == 1
