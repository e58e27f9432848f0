"""Facts that all sidecars of one Redis agree on, and their changes."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import NoPermissionError

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.fact_watcher import FactWatcher
from llm_sidecar.event_bus.facts import ABSENT, Fact, Facts
from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.event_bus.subscriber import Subscriber
from llm_sidecar.tasks import cancel
from tests.unit.fakes import until


@pytest.fixture
async def url() -> str:
    """Of a Redis in memory that all clients of a test share."""
    return f"memory://{uuid.uuid4()}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[Redis]:
    async with make_client(url) as made:
        yield made


async def test_each_replacement_adds_one_to_the_version(client: Redis) -> None:
    facts = Facts(client, "osiris.events")
    assert await facts.get("adapter") == ABSENT == (0, None)
    assert await facts.replace("adapter", 0, {"name": "a"})
    assert await facts.get("adapter") == (1, {"name": "a"})
    assert await facts.replace("adapter", 1, None)
    assert await facts.get_all(["other", "adapter"]) == [ABSENT, (2, None)]
    assert await client.keys() == ["osiris.events.adapter"]
    assert await client.ttl("osiris.events.adapter") == -1


async def test_a_fact_of_another_version_is_not_replaced(client: Redis) -> None:
    facts = Facts(client, "p")
    await facts.replace("adapter", 0, "a")
    for version in (0, 2):
        assert not await facts.replace("adapter", version, "b")
    assert await facts.get("adapter") == (1, "a")


async def test_of_two_replacements_at_once_one_succeeds(url: str, client: Redis) -> None:
    async with make_client(url) as other:
        both = Facts(client, "p"), Facts(other, "p")
        done = await asyncio.gather(*(f.replace("x", 0, n) for n, f in enumerate(both)))
    assert sorted(done) == [False, True]
    assert await both[0].get("x") == (1, done.index(True))


async def test_an_event_is_sent_if_and_only_if_the_fact_is_replaced(client: Redis) -> None:
    facts = Facts(client, "p", maxlen=10)
    event = CloudEvent("phi3.adapter.swapped", "{}", "/osiris/llm-sidecar", "x")
    async with client.pubsub() as channel:
        await channel.subscribe(event.type)
        assert not await facts.replace("adapter", 7, "a", event)
        assert await client.xlen("p") == 0
        assert await facts.replace("adapter", 0, "a", event)
        messages = [message async for message in heard(channel)]
    ((_, fields),) = await client.xrange("p") or []
    assert fields == event.fields()
    assert messages == ["{}"]


async def heard(channel: PubSub) -> AsyncIterator[str]:
    """The messages that wait."""
    while (message := await channel.get_message(timeout=0.0)) is not None:
        if message["type"] == "message":
            yield message["data"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        '{"version": 1}',
        '{"version": [], "value": 1}',
        '{"version": Infinity, "value": 1}',
        "[" * 100_000,
    ],
)
async def test_a_key_with_something_else_is_an_absent_fact(client: Redis, text: str) -> None:
    facts = Facts(client, "p")
    await client.set("p.x", text)
    assert await facts.get("x") == ABSENT
    assert await facts.replace("x", 0, "a")
    assert await facts.get("x") == (1, "a")


async def test_a_touch_changes_the_version_alone(client: Redis) -> None:
    facts = Facts(client, "p")
    for _ in range(2):
        await facts.touch("rows")
    assert await facts.get("rows") == (2, None)


class Watched:
    """A watcher of the fact `x`, and what it reports."""

    def __init__(self, client: Redis) -> None:
        self.facts = Facts(client, "p")
        self.denied = Denied()
        self.subscriber = Subscriber(client, "Redis", self.denied)
        self.watcher = FactWatcher(self.facts, self.subscriber, self.denied)
        self.changes: list[Fact] = []
        self.watcher.watch("x", self.changes.append)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        jobs = [asyncio.create_task(job.run()) for job in (self.subscriber, self.watcher)]
        try:
            yield
        finally:
            await cancel(*jobs, patience=5.0)


async def test_a_change_by_another_sidecar_is_reported_once(url: str, client: Redis) -> None:
    watched = Watched(client)
    async with watched.running(), make_client(url) as other:
        await until(lambda: watched.changes == [ABSENT])
        await Facts(other, "p").replace("x", 0, "a")
        await until(lambda: len(watched.changes) == 2)
        # A message without a change.
        await other.publish("p.facts", "x")
        await Facts(other, "p").replace("x", 1, "b")
        await until(lambda: len(watched.changes) == 3)
    assert watched.changes == [ABSENT, (1, "a"), (2, "b")]


async def test_a_change_whose_message_is_lost_is_reported_at_the_next_look(
    url: str, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.fact_watcher.LOOK_SECONDS", 0.001)
    watched = Watched(client)
    async with watched.running():
        await until(lambda: watched.changes == [ABSENT])
        await client.set("p.x", '{"version": 7, "value": "a"}')
        await until(lambda: watched.changes == [ABSENT, (7, "a")])


async def test_a_fact_is_touched_once_redis_is_connected(client: Redis) -> None:
    watched = Watched(client)
    for _ in range(2):
        watched.watcher.touch_soon("x")
    assert await watched.facts.get("x") == ABSENT
    async with watched.running():
        await until(lambda: (1, None) in watched.changes)
        watched.watcher.touch_soon("x")
        await until(lambda: watched.changes[-1] == (2, None))


async def test_denied_facts_are_reported_and_tried_again(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.event_bus.fact_watcher.LOOK_SECONDS", 0.001)
    monkeypatch.setattr("llm_sidecar.event_bus.denied.TRY_AGAIN", 0.01)
    watched = Watched(client)

    async def deny(names: object) -> None:
        raise NoPermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(watched.facts, "get_all", deny)
        async with watched.running():
            await until(lambda: watched.denied.operations() == ["GET or SET p.*"])
            patched.undo()
            await until(lambda: not watched.denied.operations())
    assert watched.changes == [ABSENT]
