"""The inbox on a real Redis: consumers that die, entries that fail, a database that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis

from llm_sidecar.errors import DatabaseUnavailable, NotFound
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.consumer_group import Entry
from tests.redis_server import RedisServer, require_redis

TIMEOUT = 60.0
"""Seconds that a test waits for a condition before it fails."""
INBOX, DEAD, GROUP = "osiris.inbox", "osiris.inbox.dead", "osiris.sidecars"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture
def probe(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens waits to fractions of a second."""
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.FIRST_DELAY", 0.01)
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.LONGEST_DELAY", 0.02)
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.BLOCK", 0.05)
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_EVERY", 0.0)


class Store:
    """A handler that keeps the data of entries, as a database would.

    Attributes:
        stored: what it keeps, in order.
        calls: how often it was called.
        away: while set, it stores nothing.
    """

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.calls = 0
        self.away = False

    async def __call__(self, entries: Sequence[Entry]) -> Sequence[str | None]:
        self.calls += 1
        if self.away:
            raise DatabaseUnavailable("the disk is full")
        if any(entry.fields["data"] == "poison" for entry in entries):
            raise RuntimeError("SECRETMARK")
        results = [
            "it is invalid" if entry.fields["data"] == "invalid" else None for entry in entries
        ]
        self.stored += [
            entry.fields["data"] for entry, why in zip(entries, results, strict=True) if why is None
        ]
        return results


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


def add(probe: redis.Redis, *data: str) -> list[str]:
    return [str(probe.xadd(INBOX, {"id": f"id-{text}", "data": text})) for text in data]


async def started(server: RedisServer, store: Store) -> EventBus:
    bus = EventBus(server.url)
    await bus.read_inbox(store)
    await bus.connect()
    return bus


def left(probe: redis.Redis) -> tuple[int, int]:
    """How many entries are in the inbox, and how many of them are pending."""
    groups = probe.xinfo_groups(INBOX) if probe.exists(INBOX) else []
    return probe.xlen(INBOX), sum(group["pending"] for group in groups)


async def test_entries_are_stored_once_and_in_order_and_leave_the_inbox(
    server: RedisServer, probe: redis.Redis
) -> None:
    data = [str(number) for number in range(1200)]
    add(probe, *data[:600])  # before there is a group
    store = Store()
    bus = await started(server, store)
    add(probe, *data[600:])
    # Counted after Redis has answered.
    await until(lambda: bus.status()["inbox"]["handled"] == 1200)
    assert store.stored == data
    assert left(probe) == (0, 0)
    inbox = bus.status()["inbox"]
    assert (inbox["dead"], inbox["claimed"], inbox["failures"]) == (0, 0, 0)
    await until(lambda: bus.status()["inbox"]["pending"] == 0)
    await bus.close()
    assert probe.xinfo_consumers(INBOX, GROUP) == []


async def test_each_entry_of_the_inbox_goes_to_one_sidecar(
    server: RedisServer, probe: redis.Redis
) -> None:
    stores = [Store(), Store()]
    buses = [await started(server, store) for store in stores]
    data = [str(number) for number in range(2000)]
    add(probe, *data)
    await until(lambda: left(probe) == (0, 0))
    assert sorted(stores[0].stored + stores[1].stored, key=int) == data
    for bus in buses:
        await bus.close()


async def test_entries_wait_while_the_database_is_away_and_do_not_count_as_failed(
    server: RedisServer,
    probe: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_AFTER", 0.5)
    store, other = Store(), Store()
    store.away = True
    bus = await started(server, store)
    data = [str(number) for number in range(10)]
    add(probe, *data)
    await until(lambda: store.calls >= 1)
    # It claims long-pending entries, but the first sidecar renews its claim on them.
    second = await started(server, other)
    await until(lambda: store.calls > 60)
    assert (store.stored, other.stored, probe.xlen(DEAD)) == ([], [], 0)
    counts = {p["times_delivered"] for p in probe.xpending_range(INBOX, GROUP, "-", "+", 100)}
    assert counts == {1}
    store.away = False
    await until(lambda: store.stored == data and left(probe) == (0, 0))
    waits = [line for line in caplog.messages if "entries of the inbox wait" in line]
    assert waits == ["entries of the inbox wait: the disk is full"]
    assert bus.status()["inbox"]["failures"] == 0
    await bus.close()
    await second.close()


async def test_invalid_entries_become_dead_letters_at_once_and_the_others_are_stored(
    server: RedisServer, probe: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    _, invalid, _ = add(probe, "1", "invalid", "2")
    bus = await started(server, store)
    await until(lambda: left(probe) == (0, 0))
    assert store.stored == ["1", "2"]
    [letter] = await bus.dead_letters.page(10)
    assert (letter.reason, letter.entry, letter.deliveries) == ("it is invalid", invalid, 1)
    assert letter.fields == {"id": "id-invalid", "data": "invalid"}
    assert letter.time.endswith("+00:00")
    assert f"entry {invalid} of the inbox is a dead letter: it is invalid" in caplog.messages
    assert bus.status()["inbox"]["dead"] == 1
    await bus.close()


async def test_an_entry_that_fails_five_times_becomes_a_dead_letter_and_delays_no_other(
    server: RedisServer, probe: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    add(probe, "1", "poison", "2")
    bus = await started(server, store)
    await until(lambda: left(probe) == (0, 0))
    assert store.stored == ["1", "2"]
    [letter] = await bus.dead_letters.page(10)
    assert letter.reason == "handling it failed 5 times: RuntimeError"
    assert letter.deliveries == 5
    # Once with the whole batch, then five times alone.
    assert bus.status()["inbox"]["failures"] == 6
    assert "SECRETMARK" not in caplog.text
    await bus.close()


async def test_pending_entries_of_a_dead_consumer_are_claimed(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_AFTER", 0.2)
    data = [str(number) for number in range(20)]
    add(probe, *data)
    probe.xgroup_create(INBOX, GROUP, "0")
    probe.xreadgroup(GROUP, "the dead", {INBOX: ">"}, count=15)
    store = Store()
    bus = await started(server, store)
    await until(lambda: left(probe) == (0, 0))
    assert sorted(store.stored, key=int) == data
    assert bus.status()["inbox"]["claimed"] == 15
    await bus.close()


async def test_only_the_entry_that_kills_its_consumers_becomes_a_dead_letter(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_AFTER", 0.0)
    first, second = add(probe, "killer", "innocent")
    probe.xgroup_create(INBOX, GROUP, "0")
    probe.xreadgroup(GROUP, "dead 1", {INBOX: ">"})
    for number in range(2, 6):
        probe.xclaim(INBOX, GROUP, f"dead {number}", 0, [first])
    store = Store()
    bus = await started(server, store)
    await until(lambda: left(probe) == (0, 0))
    assert store.stored == ["innocent"]
    [letter] = await bus.dead_letters.page(10)
    assert (letter.entry, letter.reason) == (first, "its consumer died 5 times")
    assert second != first
    await bus.close()


async def test_a_redis_that_was_emptied_gets_its_group_again(
    server: RedisServer, probe: redis.Redis
) -> None:
    store = Store()
    bus = await started(server, store)
    add(probe, "1")
    await until(lambda: store.stored == ["1"] and left(probe) == (0, 0))
    probe.flushall()
    add(probe, "2")
    await until(lambda: store.stored == ["1", "2"] and left(probe) == (0, 0))
    await bus.close()


async def test_a_denied_inbox_is_reported_and_affects_nothing_else(
    server: RedisServer, probe: redis.Redis
) -> None:
    probe.acl_setuser(
        "desk",
        enabled=True,
        passwords=["+desk"],
        keys=["osiris.events*"],
        channels=["*"],
        categories=["+@all"],
    )
    bus = EventBus(f"redis://desk:desk@127.0.0.1:{server.port}/0")
    await bus.read_inbox(Store())
    await bus.connect()
    await until(lambda: bus.status()["denied"] == ["XREADGROUP osiris.inbox"])
    await bus.publish("phi3.test", "1")
    await until(lambda: bus.status()["published"] == 1)
    await bus.close()
    probe.acl_deluser("desk")


async def test_an_outage_loses_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    require_redis()
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_AFTER", 0.2)
    own = RedisServer("--appendonly", "yes", "--appendfsync", "always", keep=True)
    store = Store()
    try:
        own.start()
        bus = await started(own, store)
        with redis.Redis(port=own.port, decode_responses=True) as probe:
            add(probe, "1")
            await until(lambda: store.stored == ["1"])
            own.kill()
            await until(lambda: not bus.connected)
            own.start()
            add(probe, "2")
            await until(lambda: store.stored[-1] == "2" and left(probe) == (0, 0))
        await bus.close()
    finally:
        own.remove()


async def test_dead_letters_come_in_pages_newest_first(
    server: RedisServer, probe: redis.Redis
) -> None:
    for number in range(5):
        entry: dict[Any, Any] = {"time": "t", "reason": f"r{number}", "entry": "1-1"}
        probe.xadd(DEAD, entry | {"deliveries": "1", "fields": "{}"}, id=f"{number + 1}-0")
    bus = EventBus(server.url)
    first = await bus.dead_letters.page(2)
    assert [letter.reason for letter in first] == ["r4", "r3"]
    second = await bus.dead_letters.page(2, before=first[-1].id)
    assert [letter.reason for letter in second] == ["r2", "r1"]
    assert await bus.dead_letters.count() == 5
    with pytest.raises(ValueError, match="not the id"):
        await bus.dead_letters.page(2, before="x")
    await bus.close()


async def test_a_dead_letter_goes_back_into_the_inbox_once(
    server: RedisServer, probe: redis.Redis
) -> None:
    store = Store()
    add(probe, "invalid")
    bus = await started(server, store)
    await until(lambda: probe.xlen(DEAD) == 1)
    [letter] = await bus.dead_letters.page(1)
    entry = await bus.dead_letters.requeue(letter.id)
    # It is handled again, and is still invalid.
    await until(lambda: probe.xlen(DEAD) == 1 and left(probe) == (0, 0))
    [again] = await bus.dead_letters.page(1)
    assert (again.entry, again.fields) == (entry, letter.fields)
    for gone in (letter.id, "x", "1-1"):
        with pytest.raises(NotFound):
            await bus.dead_letters.requeue(gone)
    await bus.close()


async def test_a_dead_letter_that_is_requeued_by_many_at_once_is_one_entry(
    server: RedisServer, probe: redis.Redis
) -> None:
    letter = str(probe.xadd(DEAD, {"fields": '{"id": "1"}'}))
    bus = EventBus(server.url)
    requeued = await asyncio.gather(
        *(bus.dead_letters.requeue(letter) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(one, NotFound) for one in requeued) == 19
    assert [fields for _, fields in probe.xrange(INBOX) or ()] == [{"id": "1"}]
    assert probe.xlen(DEAD) == 0
    await bus.close()


async def test_a_dead_letter_stays_if_the_inbox_is_no_stream(
    server: RedisServer, probe: redis.Redis
) -> None:
    letter = str(probe.xadd(DEAD, {"fields": '{"id": "1"}'}))
    probe.set(INBOX, "not a stream")
    bus = EventBus(server.url)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        await bus.dead_letters.requeue(letter)
    assert probe.xlen(DEAD) == 1
    await bus.close()


async def test_an_entry_stays_if_the_dead_letters_are_no_stream_and_holds_up_no_other(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.inbox.CLAIM_AFTER", 0.05)
    probe.set(DEAD, "not a stream")
    add(probe, "invalid")
    store = Store()
    bus = await started(server, store)
    await until(lambda: bus.status()["denied"] == [f"XADD {DEAD}"])
    add(probe, "1")
    await until(lambda: store.stored == ["1"])
    assert probe.xlen(INBOX) == 1
    probe.delete(DEAD)
    await until(lambda: probe.xlen(DEAD) == 1 and left(probe) == (0, 0))
    await until(lambda: bus.status()["denied"] == [])
    await bus.close()


@pytest.mark.parametrize(
    "added",
    [
        {"a": "b"},
        {"fields": "["},
        {"fields": "{}"},
        {"fields": '{"a": [1]}'},
        {"fields": "[" * 100_000},
        {"deliveries": "x"},
    ],
)
async def test_what_somebody_else_has_added_to_the_dead_letters_is_shown_as_it_is(
    server: RedisServer, probe: redis.Redis, added: dict[Any, Any]
) -> None:
    entry = str(probe.xadd(DEAD, added))
    bus = EventBus(server.url)
    [letter] = await bus.dead_letters.page(1)
    assert (letter.deliveries, letter.fields) == (0, added)
    assert await bus.dead_letters.page(1, before="0-0") == []
    await bus.dead_letters.requeue(entry)
    assert [fields for _, fields in probe.xrange(INBOX) or ()] == [added]
    await bus.close()


async def test_a_handler_that_returns_too_few_results_loses_no_entry(
    server: RedisServer, probe: redis.Redis
) -> None:
    async def wrong(entries: Sequence[Entry]) -> Sequence[str | None]:
        return []

    add(probe, "1")
    bus = EventBus(server.url)
    await bus.read_inbox(wrong)
    await bus.connect()
    await until(lambda: probe.xlen(DEAD) == 1)
    [letter] = await bus.dead_letters.page(1)
    assert letter.reason == "handling it failed 5 times: ValueError"
    await bus.close()


async def test_a_bus_in_memory_has_no_inbox() -> None:
    bus = EventBus("memory://")
    await bus.read_inbox(Store())
    await bus.start()
    assert bus.status()["inbox"] is None
    await bus.close()
