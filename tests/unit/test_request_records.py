"""Requests that several machines share: their records and locks in Redis."""

from __future__ import annotations

import asyncio
import datetime
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError

from llm_sidecar.event_bus import request_records as module
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.event_bus.request_records import Record, RequestRecords, SharedClaim
from llm_sidecar.event_bus.subscriber import Subscriber
from llm_sidecar.tasks import cancel

BEGUN = datetime.datetime(2026, 1, 31, 10, tzinfo=datetime.UTC)
FIRST = Record("f-1", uuid.UUID(int=1), BEGUN)


class Made:
    """One machine, connected to a Redis."""

    def __init__(self, client: Redis) -> None:
        self.denied = Denied()
        self.subscriber = Subscriber(client, "Redis", self.denied)
        self.subscriber.here.set()
        self.records = RequestRecords(client, self.subscriber, self.denied, "p")

    async def claim(self, owner: str, first: Record = FIRST) -> SharedClaim:
        claim = await self.records.claim("desk", "k", first, owner)
        assert claim is not None
        return claim

    async def save(self, record: Record) -> None:
        await self.records.save("desk", "k", record)


@pytest.fixture
async def client() -> AsyncIterator[Redis]:
    async with make_client(f"memory://{uuid.uuid4()}") as made:
        yield made


@pytest.fixture
def made(client: Redis) -> Made:
    return Made(client)


async def names(client: Redis, pattern: str = "*") -> list[str]:
    found: Any = await client.keys(pattern)
    return sorted(found)


async def test_one_machine_answers_a_request_at_a_time(made: Made, client: Redis) -> None:
    record, lock = await made.claim("a")
    assert record == FIRST
    assert lock is not None
    other = Record("f-1", uuid.UUID(int=2), BEGUN + datetime.timedelta(days=1))
    # The other one gets the record of the first.
    assert await made.claim("b", other) == (FIRST, None)
    await lock.release()
    record, lock = await made.claim("b", other)
    assert record == FIRST
    assert lock is not None
    await lock.release()
    (name,) = await names(client)
    assert name.startswith("p.request:")
    assert len(name) == len("p.request:") + 64
    assert await client.ttl(name) == 86_400


async def test_a_machine_takes_up_its_own_lock_again(made: Made, client: Redis) -> None:
    _, first = await made.claim("a")
    assert first is not None
    # Its process has died, and the lock would expire soon.
    first._renewing.cancel()
    (name,) = await names(client, "*.lock")
    await client.expire(name, 2)
    _, again = await made.claim("a")
    assert again is not None
    assert await client.ttl(name) == 15
    await again.release()
    assert await names(client, "*.lock") == []


async def test_an_answered_request_is_not_locked(made: Made, client: Redis) -> None:
    record, lock = await made.claim("a")
    assert lock is not None
    await made.save(record.answered("the änswer".encode()))
    await lock.release()
    record, lock = await made.claim("b")
    assert (record.response, record.id, lock) == ("the änswer", FIRST.id, None)
    assert await names(client, "*.lock") == []


async def test_a_request_of_another_content_is_not_locked(made: Made, client: Redis) -> None:
    _, lock = await made.claim("a")
    assert lock is not None
    await lock.release()
    record, lock = await made.claim("b", Record("f-2", uuid.UUID(int=2), BEGUN))
    assert (record, lock) == (FIRST, None)
    assert await names(client, "*.lock") == []


async def test_an_answer_of_another_machine_is_not_replaced(made: Made, client: Redis) -> None:
    record, lock = await made.claim("a")
    assert lock is not None
    # The machine is suspended for longer than its lock lasts.
    await client.delete(*await names(client, "*.lock"))
    _, other = await made.claim("b")
    assert other is not None
    await made.save(record.answered(b"the first"))
    await other.release()
    for late in (record.failed(None), record.failed('{"step": 1}'), record.answered(b"another")):
        await made.save(late)
        assert (await made.claim("c")).record.response == "the first"
    await lock.release()


async def test_a_lock_that_would_never_expire_does_not_block_for_ever(
    made: Made, client: Redis
) -> None:
    lock = f"{made.records._name('desk', 'k')}.lock"
    await client.set(lock, "of nobody")
    assert (await made.claim("a")).lock is None
    assert await client.ttl(lock) == 15


async def test_the_state_of_a_failed_attempt_is_kept(made: Made) -> None:
    record, lock = await made.claim("a")
    assert lock is not None
    await made.save(record.failed('{"step": 1}'))
    await lock.release()
    record, lock = await made.claim("b")
    assert (record.state, record.id) == ({"step": 1}, FIRST.id)
    assert lock is not None
    await lock.release()


async def test_a_failed_attempt_without_a_state_is_forgotten(made: Made, client: Redis) -> None:
    record, lock = await made.claim("a")
    assert lock is not None
    await made.save(record.failed(None))
    await lock.release()
    assert await names(client) == []


@pytest.mark.parametrize("order", [1, -1])
async def test_of_an_answer_and_a_failure_at_once_the_answer_is_kept(
    made: Made, order: int
) -> None:
    both = [FIRST.answered(b"1"), FIRST.failed('{"step": 1}')]
    await asyncio.gather(*(made.save(record) for record in both[::order]))
    record, lock = await made.claim("b")
    assert (record.response, lock) == ("1", None)


async def test_other_callers_have_other_requests(made: Made) -> None:
    keys = [("", "ab"), ("a", "b"), ("ab", "")]
    claims = [await made.records.claim(caller, key, FIRST, "a") for caller, key in keys]
    for claim in claims:
        assert claim is not None
        assert claim.lock is not None
        await claim.lock.release()
    assert len({made.records._name(*key) for key in keys}) == 3


async def test_a_record_that_is_too_large_is_not_kept(
    made: Made, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(module._encoded(FIRST.answered(b"x")))
    monkeypatch.setattr(module, "MOST_BYTES", size)
    # Two bytes.
    await made.save(FIRST.answered("ä".encode()))
    assert await names(client) == []
    await made.save(FIRST.answered(b"x"))
    assert len(await names(client, "p.request:*")) == 1


async def test_the_oldest_records_are_dropped(
    made: Made, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RECORDS", 2)
    for key in "abc":
        await made.records.save("desk", key, FIRST.answered(b"1"))
    assert await names(client, "p.request:*") == sorted(
        made.records._name("desk", key) for key in "bc"
    )
    # Redis has forgotten these by itself, a day after.
    monkeypatch.setattr(time, "time", lambda: 4e9)
    await made.records.save("desk", "d", FIRST.answered(b"1"))
    assert await client.zrange("p.requests", 0, -1) == [made.records._name("desk", "d")]


async def test_a_key_with_something_else_is_replaced(made: Made, client: Redis) -> None:
    good = {"fingerprint": "f-1", "id": str(FIRST.id), "begun": "2026-01-31T10:00:00Z"}
    bad = ({"id": "1"}, {"begun": "now"}, {"begun": "2026-01-31T10:00:00"}, {"state": "{"})
    wrong = [json.dumps(good | one | {"response": "x"}) for one in bad]
    for text in ("", "{", "[]", '{"x":' + "[" * 100_000, *wrong):
        await client.set(made.records._name("desk", "k"), text)
        record, lock = await made.claim("a")
        assert record == FIRST
        assert lock is not None
        await lock.release()


async def test_without_a_connection_nothing_is_shared(made: Made, client: Redis) -> None:
    made.subscriber.here.clear()
    assert await made.records.claim("desk", "k", FIRST, "a") is None
    await made.save(FIRST.answered(b"1"))
    assert await names(client) == []
    # Afterwards it is saved.
    saving = asyncio.create_task(made.records.run())
    made.subscriber.here.set()
    async with asyncio.timeout(5):
        while not await names(client, "p.request:*"):
            await asyncio.sleep(0)
    await cancel(saving, patience=5.0)
    assert (await made.claim("b")).record.response == "1"


async def test_a_failure_is_not_saved_later(made: Made, client: Redis) -> None:
    made.subscriber.here.clear()
    for record in (FIRST.failed("{}"), FIRST.failed(None)):
        await made.save(record)
    assert made.records._unsaved == {}


async def test_only_so_many_records_wait(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNSAVED", 2)
    made.subscriber.here.clear()
    for key in "abcc":
        await made.records.save("desk", key, FIRST.answered(b"1"))
    assert list(made.records._unsaved) == [made.records._name("desk", key) for key in "bc"]


@pytest.mark.parametrize("error", [RedisConnectionError("refused"), TimeoutError()])
async def test_a_redis_that_fails_is_checked(
    made: Made, client: Redis, monkeypatch: pytest.MonkeyPatch, error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    async def fail(*_: object) -> None:
        raise error

    checked: list[bool] = []
    monkeypatch.setattr(made.records, "_claim", fail)
    monkeypatch.setattr(made.subscriber, "check", lambda: checked.append(True))
    assert await made.records.claim("desk", "k", FIRST, "a") is None
    assert checked == [True]
    assert caplog.messages[0].startswith("an Idempotency-Key is not shared: ")


async def test_denied_records_are_reported_once(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    async def deny(*_: object) -> None:
        asked.append(True)
        raise NoPermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(made.records, "_claim", deny)
        for _ in range(2):
            assert await made.records.claim("desk", "k", FIRST, "a") is None
    assert (asked, made.denied.operations()) == ([True], ["SET p.request:*"])


async def test_a_redis_of_its_own_shares_nothing(client: Redis) -> None:
    made = Made(client)
    alone = RequestRecords(client, made.subscriber, made.denied, "p", shares=False)
    assert await alone.claim("desk", "k", FIRST, "a") is None
    await alone.save("desk", "k", FIRST.answered(b"1"))
    assert await names(client) == []
    assert alone._unsaved == {}
