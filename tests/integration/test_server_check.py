"""Looking at how a Redis keeps the events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
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


async def test_a_bus_inside_the_process_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bus = EventBus("memory://", outbox=MemoryOutbox(10, 1000))
    await bus.connect()
    # The check would be one of the first things that it does.
    await bus.publish("phi3.adapter.swapped", "{}")
    await bus.close()
    assert [line for line in caplog.messages if "whether Redis keeps" in line] == []
