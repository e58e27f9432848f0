"""The relay, with a scripted Redis and real ones: nothing lost, nothing twice in the stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
import redis

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.followed_stream import BEGINNING, Entry
from llm_sidecar.event_bus.outbox import MemoryOutbox, Queued
from llm_sidecar.event_bus.relay import Relay
from tests.redis_server import RedisServer, entries, require_redis
from tests.scripted_redis import Proxy, ScriptedRedis

TIMEOUT = 10.0
"""Seconds that a test waits for a condition before it fails."""
COUNT = 300
PAYLOADS = [str(number) for number in range(COUNT)]

PASSING = (
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "NOREPLICAS Not enough good replicas to write.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist.",
    "ERR max number of clients reached",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "ERR something new",
)


class SharedOutbox(MemoryOutbox):
    """An outbox that several relays share, one sender at a time, and that can fail.

    Attributes:
        failures: how often `sent` fails from now on.
    """

    def __init__(self) -> None:
        super().__init__(10_000, 1 << 24)
        self.failures = 0
        self._busy = False

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[bool]:
        if self._busy:
            yield False
            return
        self._busy = True
        try:
            yield True
        finally:
            self._busy = False

    async def sent(self, number: int) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise DatabaseUnavailable("the disk is full")
        await super().sent(number)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture
def probe(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port, decode_responses=True) as client:
        client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], channels=["*"])
        client.flushall()
        yield client


def event(data: str) -> CloudEvent:
    return CloudEvent(
        type="phi3.test", data=data, source="/test", dataschema="test", id=f"id-{data}"
    )


def outbox_of(payloads: Sequence[str]) -> SharedOutbox:
    outbox = SharedOutbox()
    for payload in payloads:
        outbox.add(event(payload))
    return outbox


def stream(probe: redis.Redis, name: str = "osiris.events") -> list[str]:
    """The data of all entries, oldest first."""
    return [fields["data"] for _, fields in entries(probe, name)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "abort"),
    # With too many clients, a server sends this error to a new client and closes the connection.
    [(error, abort) for error in PASSING for abort in (True, False) if abort or "max" not in error],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else f"abort={value}",
)
async def test_a_passing_error_loses_nothing_and_changes_no_order(
    monkeypatch: pytest.MonkeyPatch, error: str, abort: bool
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.relay.FIRST_DELAY", 0.01)
    left = 3

    def script(name: str, _: list[str]) -> str | None:
        nonlocal left
        if name == "XADD" and left > 0:
            left -= 1
            return error
        return error if name == "PUBLISH" and left > 0 else None

    async with ScriptedRedis(script, abort=abort) as fake:
        bus = EventBus(fake.url)
        await bus.start()
        for payload in PAYLOADS[:20]:
            await bus.publish("phi3.test", payload)
        await until(lambda: bus.status()["waiting"] == 0)
        assert fake.entries == PAYLOADS[:20]
        # The last error was one item of the reply to EXEC, so the first event is published twice.
        assert list(dict.fromkeys(fake.published)) == PAYLOADS[:20]
        assert (bus.status()["published"], bus.status()["unpublished"]) == (20, 0)
        assert (bus.status()["denied"], bus.status()["failing"]) == ([], None)
        await bus.close()


async def test_a_connection_that_ends_in_a_transaction_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.relay.FIRST_DELAY", 0.01)
    left = 3

    def script(name: str, _: list[str]) -> str | None:
        nonlocal left
        left -= name == "XADD"
        return "hang up" if name == "XADD" and left >= 0 else None

    async with ScriptedRedis(script) as fake:
        bus = EventBus(fake.url)
        await bus.start()
        for payload in PAYLOADS[:20]:
            await bus.publish("phi3.test", payload)
        await until(lambda: bus.status()["waiting"] == 0)
        assert (fake.entries, fake.published) == (PAYLOADS[:20], PAYLOADS[:20])
        await bus.close()


async def test_a_record_that_is_not_an_id_is_ignored() -> None:
    def script(name: str, _: list[str]) -> str | None:
        return None

    async with ScriptedRedis(script) as fake:
        outbox = outbox_of(PAYLOADS[:3])
        fake._keys[f"osiris.events.relay:{outbox.id}"] = "OK"
        bus = EventBus(fake.url, outbox=outbox)
        await bus.start()
        await until(lambda: len(outbox) == 0)
        assert fake.entries == PAYLOADS[:3]
        await bus.close()


async def test_a_record_that_is_no_text_counts_as_none(
    server: RedisServer, probe: redis.Redis
) -> None:
    outbox = outbox_of(PAYLOADS[:3])
    probe.lpush(f"osiris.events.relay:{outbox.id}", "x")
    bus = EventBus(server.url, outbox=outbox)
    await bus.start()
    await until(lambda: len(outbox) == 0)
    assert stream(probe) == PAYLOADS[:3]
    assert probe.get(f"osiris.events.relay:{outbox.id}") == "id-2"
    await bus.close()


async def test_an_entry_of_the_stream_is_a_cloud_event(
    server: RedisServer, probe: redis.Redis
) -> None:
    bus = EventBus(server.url)
    await bus.connect()
    await bus.publish("phi3.test", '{"a": "\u00e9"}')
    await until(lambda: stream(probe))
    [(_, fields)] = entries(probe, "osiris.events")
    made = {"id": fields.pop("id"), "time": fields.pop("time")}
    assert fields == {
        "source": "/osiris/llm-sidecar",
        "type": "phi3.test",
        "specversion": "1.0",
        "datacontenttype": "application/json",
        "dataschema": "docs/asyncapi.yaml",
        "data": '{"a": "\u00e9"}',
    }
    assert len(made["id"]) == 36 and made["time"].endswith("+00:00")
    await bus.close()


async def test_the_outbox_of_a_journal_goes_out_in_order_and_to_the_channel(
    server: RedisServer, probe: redis.Redis
) -> None:
    outbox = outbox_of(PAYLOADS)
    bus = EventBus(server.url, outbox=outbox)
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    await bus.subscribe("phi3.test", handle)
    await bus.start()
    await until(lambda: len(outbox) == 0 and len(received) == COUNT)
    assert (stream(probe), received) == (PAYLOADS, PAYLOADS)
    [record] = probe.keys("osiris.events.relay:*")
    assert probe.get(record) == f"id-{COUNT - 1}"
    assert 7 * 24 * 3600 < probe.ttl(record) <= 8 * 24 * 3600
    outbox.add(event("later"))
    await until(lambda: stream(probe)[-1] == "later")
    await bus.close()


async def test_the_stream_is_capped(server: RedisServer, probe: redis.Redis) -> None:
    outbox = outbox_of([str(number) for number in range(1000)])
    bus = EventBus(server.url, stream="small", stream_maxlen=100, outbox=outbox)
    await bus.start()
    await until(lambda: len(outbox) == 0)
    # Redis removes whole nodes of 100 entries.
    assert 100 <= probe.xlen("small") < 300
    assert stream(probe, "small")[-1] == "999"
    await bus.close()


async def test_the_stream_of_a_bus_in_memory_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.MEMORY_MAXLEN", 10)
    outbox = outbox_of(PAYLOADS)
    bus = EventBus("memory://", outbox=outbox)
    await bus.start()
    await until(lambda: len(outbox) == 0)
    page = await bus.events.page(BEGINNING, COUNT)
    kept = [item.fields["data"] for item in page.items if isinstance(item, Entry)]
    assert kept == PAYLOADS[-len(kept) :]
    assert 10 <= len(kept) < 50  # it trims in steps, too
    await bus.close()


async def test_events_that_could_not_be_removed_are_not_added_again(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.relay.FIRST_DELAY", 0.01)
    outbox = outbox_of(PAYLOADS)
    outbox.failures = 3
    bus = EventBus(server.url, outbox=outbox)
    await bus.start()
    await until(lambda: len(outbox) == 0)
    assert stream(probe) == PAYLOADS
    await bus.close()


async def test_a_crash_between_exec_and_removal_adds_nothing_twice(
    server: RedisServer, probe: redis.Redis
) -> None:
    outbox = outbox_of(PAYLOADS)
    outbox.failures = 1
    first = EventBus(server.url, outbox=outbox)
    await first.start()
    await until(lambda: outbox.failures == 0)
    await first.close()
    assert len(stream(probe)) > 0
    second = EventBus(server.url, outbox=outbox)
    await second.start()
    await until(lambda: len(outbox) == 0)
    assert stream(probe) == PAYLOADS
    await second.close()


async def test_an_outbox_that_starts_anew_with_the_same_id_loses_nothing(
    server: RedisServer, probe: redis.Redis
) -> None:
    """As with a journal restored from a backup, the numbers start below those of the record."""
    outbox = outbox_of(PAYLOADS)
    bus = EventBus(server.url, outbox=outbox)
    await bus.start()
    await until(lambda: len(outbox) == 0)
    await bus.close()
    restored = outbox_of(["a", "b", "c"])
    restored.id = outbox.id
    bus = EventBus(server.url, outbox=restored)
    await bus.start()
    await until(lambda: len(restored) == 0)
    assert stream(probe) == [*PAYLOADS, "a", "b", "c"]
    await bus.close()


async def test_two_relays_on_one_outbox_add_each_event_once_and_in_order(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.relay.LOOK_AGAIN", 0.01)
    outbox = SharedOutbox()
    buses = [EventBus(server.url, outbox=outbox) for _ in range(2)]
    for bus in buses:
        await bus.start()
    for payload in PAYLOADS:
        outbox.add(event(payload))
        await asyncio.sleep(0)
    await until(lambda: len(outbox) == 0)
    assert stream(probe) == PAYLOADS
    # The other relay continues where this one ends.
    await buses[0].close()
    outbox.add(event("last"))
    await until(lambda: stream(probe)[-1] == "last")
    await buses[1].close()


async def test_a_transaction_that_arrives_late_is_aborted(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.redis_url.REPLY_TIMEOUT", 0.2)
    outbox, late, batch = SharedOutbox(), asyncio.Event(), Relay._batch
    async with Proxy(server.port) as proxy:
        opened = proxy.gate

        def hold_back(relay: Relay, head: Sequence[Queued]) -> Sequence[Queued]:
            # WATCH and GET have passed.
            proxy.gate = late
            return batch(relay, head)

        monkeypatch.setattr(Relay, "_batch", hold_back)
        bus = EventBus(proxy.url, outbox=outbox)
        await bus.connect()
        probe.config_resetstat()
        outbox.add(event("1"))
        await until(lambda: bus.status()["failing"] is not None)
        assert stream(probe) == []
        monkeypatch.undo()
        proxy.gate = opened
        await until(lambda: len(outbox) == 0)
        late.set()
        # The late one and its repetition, each after a look whether there are transactions.
        await until(lambda: probe.info("commandstats")["cmdstat_exec"]["calls"] == 4)
        assert stream(probe) == ["1"]
        await bus.close()


async def test_a_slow_redis_delays_no_publish_and_gets_everything_in_order(
    server: RedisServer, probe: redis.Redis
) -> None:
    async with Proxy(server.port, delay=0.2) as proxy:
        bus = EventBus(proxy.url)
        await bus.connect()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for payload in PAYLOADS:
            assert await bus.publish("phi3.test", payload)
            assert await bus.publish("audio.bytes", payload)
        # To wait for each would take twice as long.
        assert loop.time() - began < COUNT * 0.2
        proxy.delay = 0.0
        await until(lambda: bus.status()["waiting"] == 0)
        assert stream(probe) == PAYLOADS
        await until(lambda: bus.status()["published"] == 2 * COUNT)
        await bus.close()


async def test_live_messages_beyond_the_bound_lose_their_oldest(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.live.LIVE_MESSAGES", 2)
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    listener = EventBus(server.url)
    await listener.connect()
    await listener.subscribe("audio.bytes", handle)
    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url)
        await bus.connect()
        opened, proxy.gate = proxy.gate, asyncio.Event()
        await bus.publish("audio.bytes", "0")
        await asyncio.sleep(0.02)  # it is already being sent
        for payload in PAYLOADS[1:6]:
            assert await bus.publish("audio.bytes", payload)
        proxy.gate.set()
        proxy.gate = opened
        await until(lambda: len(received) == 3)
        assert received == ["0", "4", "5"]
        await until(lambda: bus.status()["published"] == 3)
        assert bus.status()["unpublished"] == 3
        assert stream(probe) == []
        await bus.close()
    await listener.close()


async def test_closing_sends_what_the_journal_has_if_redis_takes_it(
    server: RedisServer, probe: redis.Redis
) -> None:
    outbox = SharedOutbox()
    bus = EventBus(server.url, outbox=outbox)
    await bus.connect()
    for payload in PAYLOADS:
        outbox.add(event(payload))
    await bus.close()
    assert (len(outbox), stream(probe)) == (0, PAYLOADS)


async def test_a_frozen_redis_gets_all_in_order_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_redis()
    monkeypatch.setattr("llm_sidecar.event_bus.redis_url.REPLY_TIMEOUT", 0.2)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.REPLY_TIMEOUT", 0.2)
    outbox = SharedOutbox()
    with RedisServer() as own, redis.Redis(port=own.port, decode_responses=True) as probe:
        bus = EventBus(own.url, outbox=outbox)
        await bus.connect()
        for number, payload in enumerate(PAYLOADS):
            if number == 100:
                own.freeze()
                await asyncio.sleep(0)
            outbox.add(event(payload))
        await until(lambda: not bus.connected)
        own.thaw()
        await until(lambda: len(outbox) == 0)
        assert stream(probe) == PAYLOADS
        assert bus.status()["outages"] == 1
        await bus.close()


async def test_a_killed_redis_that_keeps_its_data_gets_all_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_redis()
    outbox = SharedOutbox()
    own = RedisServer("--appendonly", "yes", "--appendfsync", "always", keep=True)
    try:
        own.start()
        bus = EventBus(own.url, outbox=outbox)
        await bus.connect()
        for number, payload in enumerate(PAYLOADS):
            outbox.add(event(payload))
            if number == 150:
                await until(lambda: len(outbox) < 140)
                own.kill()
        own.start()
        await until(lambda: len(outbox) == 0)
        with redis.Redis(port=own.port, decode_responses=True) as probe:
            assert stream(probe) == PAYLOADS
        await bus.close()
    finally:
        own.remove()


async def test_a_replica_takes_nothing_until_it_is_a_master_again() -> None:
    require_redis()
    with RedisServer() as own, redis.Redis(port=own.port, decode_responses=True) as probe:
        bus = EventBus(own.url)
        await bus.connect()
        probe.replicaof("127.0.0.1", own.port + 1)
        await bus.publish("phi3.test", "1")
        await until(lambda: bus.status()["failing"] is not None)
        assert bus.status()["failing"] == "You can't write against a read only replica."
        assert bus.status()["connected"]
        probe.replicaof("NO", "ONE")
        await until(lambda: bus.status()["waiting"] == 0)
        assert (stream(probe), bus.status()["failing"]) == (["1"], None)
        await bus.close()


async def test_a_full_redis_takes_nothing_until_it_has_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    require_redis()
    with RedisServer() as own, redis.Redis(port=own.port, decode_responses=True) as probe:
        bus = EventBus(own.url)
        await bus.connect()
        probe.config_set("maxmemory", "1mb")
        probe.config_set("maxmemory-policy", "noeviction")
        await bus.publish("phi3.test", '{"secret": "SECRETMARK"}')
        await until(lambda: bus.status()["failing"] is not None)
        assert bus.status()["failing"].startswith("command not allowed when used")
        assert bus.status()["waiting"] == 1
        assert bus.status()["oldest_seconds"] > 0
        probe.config_set("maxmemory", "0")
        await until(lambda: bus.status()["waiting"] == 0)
        assert stream(probe) == ['{"secret": "SECRETMARK"}']
        assert "SECRETMARK" not in caplog.text
        await bus.close()


async def test_a_denied_channel_does_not_affect_others(
    server: RedisServer, probe: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    probe.acl_setuser("default", enabled=True, nopass=True, keys=["*"], reset_channels=True)
    probe.acl_setuser("default", enabled=True, nopass=True, keys=["*"], channels=["phi3.*"])
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    bus = EventBus(server.url)
    await bus.connect()
    await bus.subscribe("phi3.test", handle)
    await bus.subscribe("secret.channel", handle)
    for payload in PAYLOADS[:4]:
        await bus.publish("secret.channel" if int(payload) % 2 else "phi3.test", payload)
        await bus.publish("audio.bytes", payload)
    await until(lambda: bus.status()["waiting"] == 0 and len(received) == 2)
    assert (stream(probe), received) == (PAYLOADS[:4], ["0", "2"])
    await until(lambda: len(bus.status()["denied"]) == 3)
    assert bus.status()["denied"] == [
        "PUBLISH audio.bytes",
        "PUBLISH secret.channel",
        "SUBSCRIBE secret.channel",
    ]
    assert bus.status()["connected"]
    assert not await bus.publish("audio.bytes", "lost")
    denials = [line for line in caplog.messages if line.startswith("Redis denies: PUBLISH secret")]
    assert len(denials) == 1
    await bus.close()


async def test_a_denied_operation_is_tried_again(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.denied.TRY_AGAIN", 0.1)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.SILENCE", 0.05)
    probe.acl_setuser("default", enabled=True, nopass=True, keys=["*"], reset_channels=True)
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    bus = EventBus(server.url)
    await bus.connect()
    await bus.subscribe("phi3.test", handle)
    await bus.publish("phi3.test", "1")
    await until(lambda: len(bus.status()["denied"]) == 2)
    probe.acl_setuser("default", enabled=True, nopass=True, keys=["*"], channels=["phi3.*"])
    await until(lambda: bus.status()["denied"] == ["PUBLISH phi3.test"])
    await asyncio.sleep(0.1)
    await bus.publish("phi3.test", "2")
    await until(lambda: received == ["2"])
    await until(lambda: bus.status()["denied"] == [])
    assert stream(probe) == ["1", "2"]
    await bus.close()


@pytest.mark.parametrize(
    ("keys", "denied"),
    [
        (["other*"], ["SET osiris.events.relay:*", "XADD osiris.events"]),
        (["osiris.events"], ["SET osiris.events.relay:*"]),
        (["osiris.events.relay:*"], ["XADD osiris.events"]),
    ],
)
async def test_a_denied_key_does_not_affect_others(
    server: RedisServer, probe: redis.Redis, keys: list[str], denied: list[str]
) -> None:
    probe.acl_setuser(
        "desk", enabled=True, passwords=["+desk"], keys=keys, channels=["*"], categories=["+@all"]
    )
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    bus = EventBus(f"redis://desk:desk@127.0.0.1:{server.port}/0")
    await bus.connect()
    await bus.subscribe("phi3.test", handle)
    for payload in PAYLOADS:
        await bus.publish("phi3.test", payload)
    await until(lambda: len(received) == COUNT)
    assert received == PAYLOADS
    assert bus.status()["denied"] == denied
    assert stream(probe) == ([] if "XADD osiris.events" in denied else PAYLOADS)
    await bus.close()
    probe.acl_deluser("desk")


def permit(probe: redis.Redis, rule: str) -> None:
    """Adds a rule to those of the default user."""
    probe.execute_command("ACL", "SETUSER", "default", rule)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("denied", ["multi", "@transaction"])
async def test_without_multi_events_wait_and_are_added_once(
    server: RedisServer, probe: redis.Redis, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.relay.LONGEST_DELAY", 0.02)
    attempts: list[Exception] = []
    failed = Relay._failed

    def count(relay: Relay, error: Exception) -> None:
        attempts.append(error)
        failed(relay, error)

    monkeypatch.setattr(Relay, "_failed", count)
    bus = EventBus(server.url)
    await bus.connect()
    await bus.publish("phi3.test", "0")
    await until(lambda: bus.status()["waiting"] == 0)
    permit(probe, f"-{denied}")
    await bus.publish("phi3.test", "1")
    await bus.publish("phi3.test", "2")
    await until(lambda: len(attempts) > 5)
    assert bus.status()["failing"] == "it denies MULTI or EXEC"
    permit(probe, f"+{denied}")
    await until(lambda: bus.status()["waiting"] == 0)
    assert stream(probe) == ["0", "1", "2"]
    await bus.close()


async def test_a_key_that_is_no_stream_counts_as_denied(
    server: RedisServer, probe: redis.Redis
) -> None:
    probe.set("osiris.events", json.dumps("not a stream"))
    received: list[str] = []

    async def handle(payload: str) -> None:
        received.append(payload)

    bus = EventBus(server.url)
    await bus.connect()
    await bus.subscribe("phi3.test", handle)
    await bus.publish("phi3.test", "1")
    await until(lambda: received == ["1"] and bus.status()["waiting"] == 0)
    assert bus.status()["denied"] == ["XADD osiris.events"]
    await bus.close()
