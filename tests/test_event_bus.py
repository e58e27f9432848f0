"""The bus on an embedded Redis and on a real one; the real one also dies and comes back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis
from redis.exceptions import RedisError as RedisPyError

from llm_sidecar.event_bus import BATCH, EventBus, RedisError
from llm_sidecar.logs import log_context
from tests.redis_server import RedisServer, require_redis

TIMEOUT = 10.0
"""Seconds within which whatever a test waits for has happened, or it fails."""

names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture
def mortal() -> Iterator[RedisServer]:
    """A server of the test's own, not started yet."""
    require_redis()
    own = RedisServer()
    yield own
    own.kill()


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://test-{next(names)}"
    server: RedisServer = request.getfixturevalue("server")
    return server.url


@pytest.fixture
async def bus(url: str) -> AsyncIterator[EventBus]:
    made = EventBus(url)
    await made.connect()
    yield made
    await made.close()


class Inbox:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self._payloads: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, payload: str) -> None:
        self._payloads.put_nowait(payload)

    async def take(self, count: int = 1) -> list[str]:
        async with asyncio.timeout(TIMEOUT):
            return [await self._payloads.get() for _ in range(count)]

    def empty(self) -> bool:
        return self._payloads.empty()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


async def flows(bus: EventBus, channel: str, inbox: Inbox) -> None:
    """A message published on a channel arrives in the inbox."""
    assert await bus.publish(channel, "it flows")
    assert await inbox.take() == ["it flows"]


async def test_a_handler_gets_what_is_published(bus: EventBus) -> None:
    inbox = Inbox()
    await bus.subscribe("c", inbox)
    payload = '{"text": "pr\u00fcfen \U0001f4c8", "lines": "a\\r\\nb"}'
    assert await bus.publish("c", payload)
    assert await inbox.take() == [payload]


async def test_a_subscription_made_before_the_connection_counts(url: str) -> None:
    bus, inbox = EventBus(url), Inbox()
    await bus.subscribe("c", inbox)
    await bus.connect()
    await flows(bus, "c", inbox)
    await bus.close()


async def test_a_message_of_megabytes_arrives_whole(bus: EventBus) -> None:
    inbox, payload = Inbox(), "UklGRg==" * 500_000
    await bus.subscribe("audio.bytes", inbox)
    assert await bus.publish("audio.bytes", payload)
    assert await inbox.take() == [payload]


async def test_order_is_kept_also_between_concurrent_publishers(bus: EventBus) -> None:
    inbox, payloads = Inbox(), [str(n) for n in range(200)]
    await bus.subscribe("c", inbox)
    await asyncio.gather(*(bus.publish("c", payload) for payload in payloads))
    assert await inbox.take(len(payloads)) == payloads


async def test_channels_are_apart(bus: EventBus) -> None:
    a, b = Inbox(), Inbox()
    await bus.subscribe("a", a)
    await bus.subscribe("b", b)
    await bus.publish("a", "for a")
    await bus.publish("b", "for b")
    assert await b.take() == ["for b"]
    assert await a.take() == ["for a"]
    assert a.empty() and b.empty()


async def test_every_handler_of_a_channel_gets_every_message(bus: EventBus) -> None:
    inboxes = [Inbox() for _ in range(50)]
    await asyncio.gather(*(bus.subscribe("c", inbox) for inbox in inboxes))
    await bus.publish("c", "1")
    await bus.publish("c", "2")
    for inbox in inboxes:
        assert await inbox.take(2) == ["1", "2"]


async def test_two_buses_share_a_redis(url: str, bus: EventBus) -> None:
    other, inbox = EventBus(url), Inbox()
    await other.connect()
    await other.subscribe("c", inbox)
    await flows(bus, "c", inbox)
    await other.close()


async def test_a_private_memory_bus_hears_only_itself() -> None:
    one, other = EventBus("memory://"), EventBus("memory://")
    inbox_one, inbox_other = Inbox(), Inbox()
    for bus, inbox in ((one, inbox_one), (other, inbox_other)):
        await bus.connect()
        await bus.subscribe("c", inbox)
    await flows(one, "c", inbox_one)
    await flows(other, "c", inbox_other)
    assert inbox_one.empty() and inbox_other.empty()
    await one.close()
    await other.close()


async def test_a_handler_that_never_ends_delays_no_other_handler(bus: EventBus) -> None:
    inbox, stuck, release = Inbox(), asyncio.Event(), asyncio.Event()

    async def slow(payload: str) -> None:
        stuck.set()
        await release.wait()

    await bus.subscribe("c", slow)
    await bus.subscribe("c", inbox)
    await bus.publish("c", "1")
    await asyncio.wait_for(stuck.wait(), TIMEOUT)
    await bus.publish("c", "2")
    assert await inbox.take(2) == ["1", "2"]
    release.set()


@pytest.mark.parametrize(("messages", "characters"), [(4, 1000), (1000, 16)])
async def test_a_slow_handler_loses_nothing_and_the_bus_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, messages: int, characters: int
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.HANDLER_QUEUE", messages)
    monkeypatch.setattr("llm_sidecar.event_bus.HANDLER_CHARACTERS", characters)
    bus, inbox = EventBus("memory://"), Inbox()
    stuck, release = asyncio.Event(), asyncio.Event()

    async def slow(payload: str) -> None:
        stuck.set()
        await release.wait()
        await inbox(payload)

    await bus.connect()
    await bus.subscribe("c", slow)
    await bus.publish("c", "first")
    await asyncio.wait_for(stuck.wait(), TIMEOUT)
    payloads = [f"{n:04}" for n in range(20)]
    for payload in payloads:
        await bus.publish("c", payload)
    await until(lambda: bus.status()["pauses"] == 1)
    release.set()
    assert await inbox.take(21) == ["first", *payloads]
    assert (bus.status()["dropped"], bus.status()["refused"]) == (0, 0)
    await bus.close()


async def test_a_handler_of_batches_gets_what_has_arrived_in_order(bus: EventBus) -> None:
    batches: list[list[str]] = []
    started, release = asyncio.Event(), asyncio.Event()

    async def handle(payloads: list[str]) -> None:
        batches.append(payloads)
        started.set()
        await release.wait()

    inbox = Inbox()
    await bus.subscribe_batches("c", handle)
    await bus.subscribe("c", inbox)
    await bus.publish("c", "first")
    await asyncio.wait_for(started.wait(), TIMEOUT)
    payloads = [str(n) for n in range(BATCH + 1)]
    for payload in payloads:
        await bus.publish("c", payload)
    await inbox.take(2 + BATCH)
    release.set()
    await until(lambda: sum(map(len, batches)) == 2 + BATCH)
    assert batches == [["first"], payloads[:BATCH], payloads[BATCH:]]


async def test_a_message_that_is_too_long_is_refused_and_the_next_one_arrives(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.LONGEST_MESSAGE", 10)
    inbox = Inbox()
    await bus.subscribe("c", inbox)
    await bus.publish("c", "x" * 11)
    await bus.publish("c", "x" * 10)
    assert await inbox.take() == ["x" * 10]
    assert bus.status()["refused"] == 1
    assert "a message on c is refused: it is too long" in caplog.messages


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_a_handler_that_raises_is_logged_and_counted_and_goes_on(
    bus: EventBus, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    inbox = Inbox()

    async def picky(payload: str) -> None:
        if payload == "the bad one":
            raise error
        await inbox(payload)

    await bus.subscribe("some.channel", picky)
    await bus.publish("some.channel", "the bad one")
    await bus.publish("some.channel", "a good one")
    assert await inbox.take() == ["a good one"]
    assert bus.status()["handler_errors"] == 1
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert "some.channel" in record.getMessage()
    assert "the bad one" not in caplog.text


async def test_a_message_that_a_listener_refuses_is_counted_and_logged(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    bus.refuse("some.channel", "it is too long")
    assert bus.status()["refused"] == 1
    assert bus.status()["handler_errors"] == 0
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("ERROR", "a message on some.channel is refused: it is too long")
    ]


async def test_a_registered_queue_gets_messages_until_it_is_unregistered(bus: EventBus) -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()
    inbox = Inbox()
    await bus.register_listener_queue("c", queue)
    await bus.subscribe("c", inbox)
    await flows(bus, "c", inbox)
    assert queue.get_nowait() == "it flows"
    await bus.unregister_listener_queue("c", queue)
    await flows(bus, "c", inbox)
    assert queue.empty()


async def test_a_queue_can_come_back_to_a_channel_that_it_left_empty(bus: EventBus) -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()
    for payload in ("1", "2", "3"):
        await bus.register_listener_queue("c", queue)
        await bus.publish("c", payload)
        assert await asyncio.wait_for(queue.get(), TIMEOUT) == payload
        await bus.unregister_listener_queue("c", queue)
    await asyncio.wait_for(bus.close(), 2)  # while the last unsubscribing may still be under way


async def test_a_channel_without_queues_is_given_back_to_redis(server: RedisServer) -> None:
    bus, queue = EventBus(server.url), asyncio.Queue[str]()
    await bus.connect()
    with redis.Redis(port=server.port, decode_responses=True) as probe:
        await bus.register_listener_queue("given.back", queue)
        assert probe.pubsub_channels("given.*") == ["given.back"]
        await bus.unregister_listener_queue("given.back", queue)
        await until(lambda: probe.pubsub_channels("given.*") == [])
    await bus.close()


async def test_unregistering_a_stranger_is_no_error(bus: EventBus) -> None:
    await bus.unregister_listener_queue("c", asyncio.Queue())


async def test_a_full_queue_loses_its_oldest(bus: EventBus) -> None:
    small: asyncio.Queue[str] = asyncio.Queue(2)
    inbox = Inbox()
    await bus.register_listener_queue("c", small)
    await bus.subscribe("c", inbox)
    for payload in ("1", "2", "3", "4", "5"):
        await bus.publish("c", payload)
    assert await inbox.take(5) == ["1", "2", "3", "4", "5"]
    assert [small.get_nowait(), small.get_nowait()] == ["4", "5"]
    assert bus.status()["dropped"] == 3


async def test_a_cancelled_registration_leaves_the_connection_alone(bus: EventBus) -> None:
    inbox = Inbox()
    await bus.subscribe("c", inbox)
    for wait in range(4):
        joining = asyncio.create_task(bus.register_listener_queue(f"d{wait}", asyncio.Queue()))
        for _ in range(wait):
            await asyncio.sleep(0)
        joining.cancel()
    await flows(bus, "c", inbox)
    assert bus.status()["outages"] == 0


async def test_a_payload_that_is_no_text_is_a_type_error(bus: EventBus) -> None:
    with pytest.raises(TypeError, match="dict"):
        await bus.publish("c", {"not": "text"})  # type: ignore[arg-type]


async def test_bytes_that_are_no_text_do_not_stop_the_reader(server: RedisServer) -> None:
    bus, inbox = EventBus(server.url), Inbox()
    await bus.connect()
    await bus.subscribe("c", inbox)
    with redis.Redis(port=server.port) as stranger:
        stranger.publish("c", b"\xff\xfe")
    assert await inbox.take() == ["\ufffd\ufffd"]
    await flows(bus, "c", inbox)
    await bus.close()


async def test_the_status_of_a_healthy_bus(bus: EventBus, url: str) -> None:
    assert bus.status() == {
        "connected": True,
        "url": url,
        "outages": 0,
        "seconds_away": 0.0,
        "published": 0,
        "published_late": 0,
        "waiting": 0,
        "unpublished": 0,
        "oldest_seconds": 0.0,
        "failing": None,
        "handler_errors": 0,
        "refused": 0,
        "dropped": 0,
        "pauses": 0,
        "denied": [],
        "warnings": [],
        "inbox": None,
    }


async def test_connecting_to_an_unreachable_redis_raises_in_bounded_time(
    mortal: RedisServer,
) -> None:
    assert RedisError is RedisPyError
    bus = EventBus(mortal.url)
    start = time.monotonic()
    with pytest.raises(RedisError):
        await bus.connect()
    assert time.monotonic() - start < 5
    await bus.close()


async def test_starting_without_redis_keeps_what_is_published_and_says_so_once(
    mortal: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus(mortal.url)
    await bus.start()
    assert [await bus.publish("c", "early") for _ in range(3)] == [False] * 3
    assert [r.getMessage().partition(" at ")[0] for r in caplog.records] == ["Redis is away"]
    status = bus.status()
    assert (status["connected"], status["outages"], status["waiting"]) == (False, 1, 3)
    await bus.close()
    assert (bus.status()["waiting"], bus.status()["unpublished"]) == (0, 3)
    assert "3 messages were never published" in caplog.text


async def test_what_an_outage_held_back_goes_out_in_order(mortal: RedisServer) -> None:
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.start()
    await bus.subscribe("c", inbox)
    payloads = [str(n) for n in range(100)]
    for payload in payloads:
        assert not await bus.publish("c", payload)
    mortal.start()
    assert await inbox.take(len(payloads)) == payloads
    await until(lambda: bus.status()["waiting"] == 0)
    await flows(bus, "c", inbox)
    await until(lambda: bus.status()["published"] == 101)
    status = bus.status()
    assert (status["published_late"], status["waiting"], status["unpublished"]) == (100, 0, 0)
    assert (status["oldest_seconds"], status["failing"]) == (0.0, None)
    await bus.close()


async def test_a_kill_in_the_middle_of_ten_thousand_messages_loses_and_reorders_none(
    mortal: RedisServer,
) -> None:
    mortal.start()
    bus = EventBus(mortal.url)
    received: list[int] = []

    async def receive(payload: str) -> None:
        received.append(int(payload))

    await bus.connect()
    await bus.subscribe("c", receive)
    sent = []
    for number in range(10_000):
        if number == 5_000:
            # In the middle of a transaction, while most of the earlier events wait to be sent.
            mortal.kill()
            await until(lambda: not bus.status()["connected"])
        if number == 5_500:
            mortal.start()
            await until(lambda: bus.status()["connected"] and not bus.status()["waiting"])
        sent.append(await bus.publish("c", str(number)))
    await until(lambda: received[-1] == 9_999 and not bus.status()["waiting"])
    # A subscriber may get an event twice if Redis could not acknowledge it.
    assert list(dict.fromkeys(received)) == list(range(10_000))
    assert sent == [not 5_000 <= number < 5_500 for number in range(10_000)]
    status = bus.status()
    assert (status["published"], status["unpublished"]) == (10_000, 0)
    assert (status["outages"], status["dropped"]) == (1, 0)
    assert status["published_late"] >= 500
    await bus.close()


async def test_the_outbox_is_bounded_and_drops_its_oldest(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.publisher.OUTBOX_MESSAGES", 4)
    monkeypatch.setattr("llm_sidecar.event_bus.publisher.OUTBOX_CHARACTERS", 1000)
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.start()
    await bus.subscribe("c", inbox)
    for payload in ("1", "2", "3", "4", "5"):
        await bus.publish("c", payload)
    assert (bus.status()["waiting"], bus.status()["unpublished"]) == (4, 1)
    await bus.publish("c", "6" * 998)
    assert (bus.status()["waiting"], bus.status()["unpublished"]) == (3, 3)
    mortal.start()
    assert await inbox.take(3) == ["4", "5", "6" * 998]
    await bus.close()


async def test_audio_does_not_wait_for_redis(mortal: RedisServer) -> None:
    bus = EventBus(mortal.url)
    await bus.start()
    assert not await bus.publish("audio.bytes", "UklGRg==")
    assert (bus.status()["waiting"], bus.status()["unpublished"]) == (0, 1)
    await bus.close()


async def test_messages_flow_once_a_late_redis_is_there(mortal: RedisServer) -> None:
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.start()
    await bus.subscribe("c", inbox)
    mortal.start()
    await until(lambda: bus.status()["connected"])
    await flows(bus, "c", inbox)
    assert bus.status()["seconds_away"] > 0
    await bus.close()


async def test_a_killed_redis_is_noticed_and_subscribed_to_again_when_it_is_back(
    mortal: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mortal.start()
    bus, first, second = EventBus(mortal.url), Inbox(), Inbox()
    await bus.connect()
    await bus.subscribe("first", first)
    await bus.subscribe("second", second)
    await flows(bus, "first", first)
    mortal.kill()
    await until(lambda: not bus.status()["connected"])
    assert not await bus.publish("first", "held back")
    late = Inbox()
    await bus.subscribe("late", late)
    mortal.start()
    await until(lambda: bus.status()["connected"])
    assert await first.take() == ["held back"]
    await flows(bus, "first", first)
    await flows(bus, "second", second)
    await flows(bus, "late", late)
    status = bus.status()
    assert (status["outages"], status["unpublished"]) == (1, 0)
    assert status["seconds_away"] > 0
    assert "Redis is back" in caplog.text
    await bus.close()


async def test_a_restart_between_two_looks_is_an_outage_too(mortal: RedisServer) -> None:
    mortal.start()
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.connect()
    await bus.subscribe("c", inbox)
    mortal.kill()
    mortal.start()
    await until(lambda: bus.status()["outages"] == 1 and bus.status()["connected"])
    await flows(bus, "c", inbox)
    await bus.close()


async def test_a_subscriber_that_redis_cuts_off_counts_an_outage(mortal: RedisServer) -> None:
    mortal.start()
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.connect()
    await bus.subscribe("c", inbox)
    with redis.Redis(port=mortal.port) as operator:
        operator.client_kill_filter(_type="pubsub")
    await until(lambda: bus.status()["outages"] == 1 and bus.status()["connected"])
    await flows(bus, "c", inbox)
    await bus.close()


async def test_a_frozen_redis_is_found_by_the_publisher(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.redis_url.REPLY_TIMEOUT", 0.2)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.REPLY_TIMEOUT", 0.3)
    mortal.start()
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.connect()
    await bus.subscribe("c", inbox)
    mortal.freeze()
    assert await bus.publish("c", "held back")
    await until(lambda: not bus.status()["connected"])
    assert bus.status()["waiting"] == 1
    mortal.thaw()
    await until(lambda: bus.status()["connected"])
    assert await inbox.take() == ["held back"]
    await flows(bus, "c", inbox)
    assert bus.status()["outages"] == 1
    await bus.close()


async def test_an_outage_is_logged_without_the_id_of_the_request_that_finds_it(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.redis_url.REPLY_TIMEOUT", 0.2)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.REPLY_TIMEOUT", 0.1)
    ids: list[tuple[str, str | None]] = []

    def note(record: logging.LogRecord) -> bool:
        ids.append((record.getMessage()[:13], log_context.get().get("request_id")))
        return True

    mortal.start()
    bus = EventBus(mortal.url)
    await bus.connect()
    mortal.freeze()
    caplog.handler.addFilter(note)
    token = log_context.set({"request_id": "one"})
    await bus.publish("c", "held back")
    log_context.reset(token)
    await until(lambda: not bus.status()["connected"])
    caplog.handler.removeFilter(note)
    assert ids == [("Redis is away", None)]
    mortal.thaw()
    await bus.close()


async def test_a_frozen_redis_is_found_by_a_bus_that_only_listens(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.SILENCE", 0.2)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.REPLY_TIMEOUT", 0.3)
    mortal.start()
    bus, inbox = EventBus(mortal.url), Inbox()
    await bus.connect()
    await bus.subscribe("c", inbox)
    mortal.freeze()
    await until(lambda: not bus.status()["connected"])
    mortal.thaw()
    await until(lambda: bus.status()["connected"])
    await flows(bus, "c", inbox)
    await bus.close()


@pytest.mark.parametrize("subscribed", [True, False])
async def test_a_quiet_redis_is_no_outage(
    url: str, monkeypatch: pytest.MonkeyPatch, subscribed: bool
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.SILENCE", 0.02)
    bus, inbox = EventBus(url), Inbox()
    await bus.connect()
    if subscribed:
        await bus.subscribe("c", inbox)
    await asyncio.sleep(0.5)  # some twenty signs of life
    assert bus.status()["outages"] == 0
    await bus.subscribe("d", inbox)
    await flows(bus, "d", inbox)
    await bus.close()


async def test_publishing_without_a_pause_lets_the_bus_connect(mortal: RedisServer) -> None:
    bus = EventBus(mortal.url)
    await bus.start()
    mortal.start()

    async def publish_until_sent() -> None:
        while not await bus.publish("audio.bytes", "x"):
            pass

    await asyncio.wait_for(publish_until_sent(), TIMEOUT)
    await bus.close()


async def test_connecting_ends_a_long_pause_between_attempts(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.FIRST_DELAY", 600.0)
    bus = EventBus(mortal.url)
    await bus.start()
    mortal.start()
    await bus.connect()
    assert bus.status()["connected"]
    assert await bus.publish("c", "sent")
    await bus.close()


async def test_a_kill_under_concurrent_publishers_loses_nothing_and_keeps_each_ones_order(
    mortal: RedisServer,
) -> None:
    mortal.start()
    bus = EventBus(mortal.url)
    received: list[tuple[int, int]] = []
    published: list[tuple[int, int]] = []

    async def receive(payload: str) -> None:
        publisher, number = payload.split()
        received.append((int(publisher), int(number)))

    async def publish(publisher: int) -> None:
        for number in range(300):
            if await bus.publish("c", f"{publisher} {number}"):
                published.append((publisher, number))

    await bus.connect()
    await bus.subscribe("c", receive)
    publishing = [asyncio.create_task(publish(publisher)) for publisher in range(20)]
    await until(lambda: len(published) > 1000)
    await asyncio.to_thread(mortal.kill)
    await asyncio.wait(publishing)
    mortal.start()
    await until(lambda: bus.status()["connected"] and not bus.status()["waiting"])
    await flows_on_another_channel(bus)
    status = bus.status()
    # One that Redis took and could not confirm is sent again; one that it took as it died, and
    # confirmed, may not have reached us.
    missing = set(published) - set(received)
    assert len(missing) <= 20
    assert len(received) - len(set(received)) <= 1
    for publisher in range(20):
        numbers = list(dict.fromkeys(n for p, n in received if p == publisher))
        assert numbers == sorted(numbers)
    assert len(set(received)) + len(missing) + status["unpublished"] == 20 * 300
    await bus.close()


async def flows_on_another_channel(bus: EventBus) -> None:
    """Also waits until earlier messages of all channels are delivered."""
    inbox = Inbox()
    await bus.subscribe("other", inbox)
    await flows(bus, "other", inbox)


async def test_closing_leaves_no_task_and_no_connection(server: RedisServer) -> None:
    def clients() -> set[int]:
        return {int(client["id"]) for client in probe.client_list()}

    with redis.Redis(port=server.port) as probe:
        before_clients, before_tasks = clients(), asyncio.all_tasks()
        bus = EventBus(server.url)
        await bus.connect()
        await bus.subscribe("c", Inbox())
        await bus.register_listener_queue("d", asyncio.Queue())
        await bus.publish("c", "1")
        await until(lambda: bus.status()["published"] == 1)
        assert len(clients()) == len(before_clients) + 2
        await bus.close()
        assert asyncio.all_tasks() == before_tasks
        await until(lambda: clients() == before_clients)


async def test_closing_lets_handlers_finish_what_they_have(bus: EventBus) -> None:
    seen: list[str] = []
    started = asyncio.Event()

    async def slow(payload: str) -> None:
        started.set()
        for _ in range(10):
            await asyncio.sleep(0)
        seen.append(payload)

    inbox = Inbox()
    await bus.subscribe("c", slow)
    await bus.subscribe("c", inbox)
    for payload in ("1", "2", "3"):
        await bus.publish("c", payload)
    assert await inbox.take(3) == ["1", "2", "3"]
    await bus.close()
    assert seen == ["1", "2", "3"]


async def test_closing_does_not_wait_for_ever(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.DRAIN_TIMEOUT", 0.05)
    stuck = asyncio.Event()

    async def endless(payload: str) -> None:
        stuck.set()
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    await bus.subscribe("c", endless)
    await bus.publish("c", "1")
    await asyncio.wait_for(stuck.wait(), TIMEOUT)
    await asyncio.wait_for(bus.close(), TIMEOUT)
    assert asyncio.all_tasks() <= before
    assert "did not finish" in caplog.text


async def test_a_bus_that_is_away_closes_at_once(mortal: RedisServer) -> None:
    before = asyncio.all_tasks()
    bus = EventBus(mortal.url)
    await bus.start()
    await asyncio.wait_for(bus.close(), 1)
    assert asyncio.all_tasks() == before


async def test_use_after_the_close_is_a_logged_error(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus(url)
    await bus.connect()
    await bus.close()
    await bus.close()
    assert not await bus.publish("c", "1")
    await bus.start()
    await bus.subscribe("c", Inbox())
    await bus.register_listener_queue("c", asyncio.Queue())
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 4
    assert all("closed" in r.getMessage() for r in caplog.records)
    with pytest.raises(RedisError, match="closed"):
        await bus.connect()
    assert not bus.status()["connected"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hunter2@example.org:6380/1", "redis://:***@example.org:6380/1"),
        ("rediss://app:hunter2@example.org/0", "rediss://app:***@example.org/0"),
        ("redis://example.org/0?password=hunter2", "redis://example.org/0"),
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("memory://name", "memory://name"),
        ("memory://", "memory://"),
    ],
)
async def test_the_status_shows_no_password(url: str, shown: str) -> None:
    assert EventBus(url).status()["url"] == shown


async def test_a_password_is_used_and_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    require_redis()
    caplog.set_level(logging.DEBUG)
    with RedisServer("--requirepass", "hunter2") as guarded:
        address = f"127.0.0.1:{guarded.port}/0"
        bus, inbox = EventBus(f"redis://:hunter2@{address}"), Inbox()
        await bus.connect()
        await bus.subscribe("c", inbox)
        await flows(bus, "c", inbox)
        guarded.kill()
        await until(lambda: not bus.status()["connected"])
        assert not await bus.publish("c", "lost")
        await bus.close()
    with RedisServer("--requirepass", "another") as guarded:
        wrong = EventBus(f"redis://:hunter2@127.0.0.1:{guarded.port}/0")
        await wrong.start()
        assert not wrong.status()["connected"]
        with pytest.raises(RedisError):
            await wrong.connect()
        await wrong.close()
    assert "Redis is away" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("url", ["http://:hunter2@example.org", "redis://:hunter2:x@host:no", ""])
def test_a_url_that_cannot_be_read_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="cannot be read") as caught:
        EventBus(url)
    assert "hunter2" not in str(caught.value)


def test_importing_it_imports_no_fakeredis_and_no_heavy_library() -> None:
    heavy = {"fakeredis", "torch", "transformers", "onnxruntime_genai", "lancedb", "fastapi"}
    code = f"import sys, llm_sidecar.event_bus; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
