"""Reads the stream of events, and checks the options of Redis that may lose events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.outbox import MemoryOutbox
from llm_sidecar.event_bus.redis_url import close_client, make_client
from llm_sidecar.event_bus.server_check import durability
from tests.redis_server import RedisServer, require_redis

WARNINGS = {
    "appendonly": "appendonly of Redis is no, not yes: a restart of Redis loses everything",
    "appendfsync": "appendfsync of Redis is everysec, not always: "
    "a power failure loses up to a second of events",
    "maxmemory-policy": "maxmemory-policy of Redis is allkeys-lru, not noeviction: "
    "a full Redis deletes events",
}


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


@pytest.fixture(params=["memory", "redis"])
async def bus(
    request: pytest.FixtureRequest, server: RedisServer, probe: redis.Redis
) -> AsyncIterator[EventBus]:
    made = EventBus("memory://" if request.param == "memory" else server.url)
    await made.connect()
    yield made
    await made.close()


async def test_a_stream_without_events(bus: EventBus) -> None:
    assert await bus.events.last_id() == "0-0"
    assert await bus.events.read("0-0", 0.01) == []


async def test_events_are_read_after_an_id_and_waited_for(bus: EventBus) -> None:
    for payload in ("1", "2", "3"):
        await bus.publish("phi3.test", payload)
    first = await bus.events.read("0-0", 5.0, count=1)
    assert [fields["data"] for _, fields in first] == ["1"]
    seen = first
    while len(seen) < 3:
        seen += await bus.events.read(seen[-1][0], 5.0)
    assert [fields["data"] for _, fields in seen] == ["1", "2", "3"]
    after = seen[-1][0]
    assert await bus.events.last_id() == after
    waiting = asyncio.create_task(bus.events.read(after, 5.0))
    await bus.publish("phi3.test", "4")
    assert [fields["data"] for _, fields in await waiting] == ["4"]


async def warnings_of(server: RedisServer, user: str = "") -> list[str]:
    client = make_client(f"redis://{user}127.0.0.1:{server.port}/0")
    try:
        return await durability(client)
    finally:
        await close_client(client)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["appendonly"]),
        ({"appendonly": "yes"}, ["appendfsync"]),
        ({"appendonly": "yes", "appendfsync": "always"}, []),
        ({"maxmemory-policy": "allkeys-lru"}, ["appendonly", "maxmemory-policy"]),
    ],
)
async def test_a_redis_that_may_lose_events_is_named(
    server: RedisServer,
    probe: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, str],
    expected: list[str],
) -> None:
    before: dict[str, Any] = {name: probe.config_get(name)[name] for name in WARNINGS}
    for name, value in options.items():
        probe.config_set(name, value)
    try:
        lines = await warnings_of(server)
    finally:
        for name, value in before.items():
            probe.config_set(name, value)
    assert lines == [WARNINGS[name] for name in expected]
    assert caplog.messages == lines


@pytest.mark.parametrize(
    ("denied", "expected"), [(["-config"], ["appendonly"]), (["-config", "-info"], [])]
)
async def test_without_permission_for_config_fewer_options_are_checked(
    server: RedisServer,
    probe: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    denied: list[str],
    expected: list[str],
) -> None:
    caplog.set_level(logging.INFO)
    probe.acl_setuser(
        "desk",
        enabled=True,
        passwords=["+desk"],
        keys=["*"],
        channels=["*"],
        categories=["+@all"],
        commands=denied,
    )
    assert await warnings_of(server, "desk:desk@") == [WARNINGS[name] for name in expected]
    unknown = [line for line in caplog.messages if line.startswith("it is not known whether")]
    assert len(unknown) == ("-info" in denied)
    probe.acl_deluser("desk")


async def test_only_a_bus_with_durable_events_warns(
    server: RedisServer, probe: redis.Redis
) -> None:
    plain = EventBus(server.url)
    durable = EventBus(server.url, outbox=MemoryOutbox(10, 1000))
    for bus in (plain, durable):
        await bus.connect()
    async with asyncio.timeout(10):
        while not durable.status()["warnings"]:
            await asyncio.sleep(0.01)
    assert durable.status()["warnings"] == [WARNINGS["appendonly"]]
    assert plain.status()["warnings"] == []
    for bus in (plain, durable):
        await bus.close()
