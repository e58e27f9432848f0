"""Leases: one holder at a time, renewed, expiring."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from llm_sidecar.event_bus import leases as module
from llm_sidecar.event_bus.leases import Lease, Leases
from llm_sidecar.event_bus.redis_url import make_client

KEY = "p.lease:compaction"


@pytest.fixture
async def client() -> AsyncIterator[Redis]:
    async with make_client(f"memory://{uuid.uuid4()}") as made:
        yield made


async def test_one_holds_a_lease_at_a_time(client: Redis) -> None:
    one, other = Leases(client, "p"), Leases(client, "p")
    async with one.held("compaction") as mine:
        assert mine
        assert await client.ttl(KEY) == 15
        async with other.held("compaction") as also:
            assert not also
        async with other.held("something else") as also:
            assert also
    assert await client.keys() == []
    async with other.held("compaction") as mine:
        assert mine


async def test_a_lease_is_released_after_an_error(client: Redis) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Leases(client, "p").held("compaction"):
            raise ZeroDivisionError
    assert await client.keys() == []


async def enter(lease: AbstractAsyncContextManager[bool], order: list[bool]) -> None:
    async with lease as mine:
        order.append(mine)


async def test_a_sidecar_that_waits_gets_the_lease_next(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    leases, order = Leases(client, "p"), list[bool]()
    async with leases.held("compaction"):
        waiting = asyncio.create_task(enter(leases.held("compaction", wait=True), order))
        for _ in range(20):
            await asyncio.sleep(0)
        assert order == []
    await waiting
    assert order == [True]


async def test_a_lease_is_renewed_while_its_holder_works(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.0)
    async with Leases(client, "p").held("compaction"):
        await client.expire(KEY, 1)
        async with asyncio.timeout(5):
            while await client.ttl(KEY) != 15:
                await asyncio.sleep(0)


async def test_a_lease_that_has_expired_is_left_to_its_next_holder(
    client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.0)
    async with Leases(client, "p").held("compaction"):
        await client.set(KEY, "of another", ex=9)
        async with asyncio.timeout(5):
            while not caplog.messages:
                await asyncio.sleep(0)
    assert caplog.messages == [f"a lease has expired while its holder works: {KEY}"]
    assert (await client.get(KEY), await client.ttl(KEY)) == ("of another", 9)


async def test_a_key_that_would_never_expire_is_no_lease_for_ever(client: Redis) -> None:
    await client.set(KEY, "of nobody")
    async with Leases(client, "p").held("compaction") as mine:
        assert not mine
    assert await client.ttl(KEY) == 15


async def test_without_redis_a_lease_that_only_saves_work_is_not_needed(
    client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leases = Leases(client, "p")
    async with leases.held("compaction") as mine:
        assert mine
        async with leases.held("compaction") as also:
            assert not also

    async def fail(*_: object, **__: object) -> None:
        raise RedisConnectionError("refused")

    monkeypatch.setattr(client, "set", fail)
    async with leases.held("compaction") as mine:
        assert mine
    leases.close()
    async with leases.held("compaction") as mine:
        assert not mine
    assert caplog.messages == ["a lease cannot be taken, so others may do the same: refused"]


async def test_a_lease_ends_in_any_case_after_its_longest_time(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.0)
    lease = Lease(client, KEY, "mine", most_seconds=0.0)
    await lease._renewing
    await lease.release()
