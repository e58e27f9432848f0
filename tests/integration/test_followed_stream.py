"""Readers of a stream, with a real Redis and with the one inside the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError

from llm_sidecar.event_bus import followed_stream as module
from llm_sidecar.event_bus.followed_stream import BEGINNING, Entry, EntryId, FollowedStream, Gap
from llm_sidecar.event_bus.redis_url import make_client
from tests.redis_server import RedisServer, require_redis

NAME = "osiris.events"


@pytest.fixture(params=["redis", "memory"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")
    async with make_client(url) as made:
        await made.flushall()
        yield made


@pytest.fixture
def stream(client: Any, request: pytest.FixtureRequest) -> FollowedStream:
    return FollowedStream(client, NAME, polls="memory" in request.node.name)


async def add(client: Any, *values: str) -> list[EntryId]:
    return [EntryId.parse(await client.xadd(NAME, {"data": value})) for value in values]


async def following(
    stream: FollowedStream, after: EntryId
) -> tuple[AsyncGenerator[Entry | Gap, None], asyncio.Task[Entry | Gap]]:
    """A reader that waits for its first item."""
    feed = stream.follow(after)
    first = asyncio.ensure_future(anext(feed))
    while stream._watching is None:
        await asyncio.sleep(0)
    return feed, first


async def test_the_end_of_a_stream_is_its_newest_id_even_if_that_was_removed(
    client: Any,
    stream: FollowedStream,
) -> None:
    assert await stream.end() == BEGINNING
    *_, last = await add(client, "a", "b")
    assert await stream.end() == last
    await client.xtrim(NAME, 0, approximate=False)
    assert await stream.end() == last


async def test_readers_get_every_entry_after_their_place_and_then_new_ones(
    client: Any, stream: FollowedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    first, *_ = await add(client, *"abcdef")
    old, new = stream.follow(first), stream.follow(await stream.end())
    assert [(await anext(old)).fields["data"] for _ in range(5)] == [*"bcdef"]  # type: ignore[union-attr]
    waiting = [asyncio.ensure_future(anext(feed)) for feed in (old, new)]
    await asyncio.sleep(0)
    (added,) = await add(client, "g")
    async with asyncio.timeout(1):
        assert [await item for item in waiting] == [Entry(added, {"data": "g"})] * 2
    await old.aclose()
    await new.aclose()


async def test_a_reader_whose_entries_were_removed_gets_a_gap(
    client: Any, stream: FollowedStream
) -> None:
    ids = await add(client, *"abcd")
    await client.xtrim(NAME, 2, approximate=False)
    feed = stream.follow(ids[0])
    items = [await anext(feed) for _ in range(3)]
    assert items == [
        Gap(ids[0], ids[2]),
        Entry(ids[2], {"data": "c"}),
        Entry(ids[3], {"data": "d"}),
    ]
    await feed.aclose()


@pytest.mark.parametrize("text", ["9999999999999-0", f"{(1 << 64) - 1}-{(1 << 64) - 1}"])
async def test_a_reader_of_another_stream_gets_a_gap_and_what_is_added_from_then_on(
    client: Any, stream: FollowedStream, text: str
) -> None:
    *_, last = await add(client, *"ab")
    elsewhere = EntryId.parse(text)
    feed = stream.follow(elsewhere)
    assert await anext(feed) == Gap(elsewhere, last)
    (added,) = await add(client, "c")
    assert await anext(feed) == Entry(added, {"data": "c"})
    await feed.aclose()


async def test_stopping_ends_readers_that_wait_and_later_ones(
    client: Any, stream: FollowedStream
) -> None:
    _, first = await following(stream, BEGINNING)
    stream.stop_following()
    async with asyncio.timeout(1):
        with pytest.raises(StopAsyncIteration):
            await first
    assert [item async for item in stream.follow(BEGINNING)] == []


async def test_the_watcher_ends_with_the_last_reader(client: Any, stream: FollowedStream) -> None:
    (feed, first), (other, second) = [await following(stream, BEGINNING) for _ in range(2)]
    watching = stream._watching
    assert watching is not None
    (added,) = await add(client, "a")
    assert await first == await second == Entry(added, {"data": "a"})
    await feed.aclose()
    assert not watching.cancelling()
    await other.aclose()
    async with asyncio.timeout(1):
        await asyncio.wait([watching])


async def test_a_reader_that_comes_as_the_last_one_goes_is_woken(
    client: Any, stream: FollowedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, first = await following(stream, BEGINNING)
    (added,) = await add(client, "a")
    await first
    page, found_nothing = stream.page, asyncio.Event()

    async def noted(after: EntryId) -> module.Page:
        found = await page(after)
        found_nothing.set()
        return found

    async def add_later() -> None:
        await found_nothing.wait()
        await add(client, "b")

    monkeypatch.setattr(stream, "page", noted)
    await feed.aclose()
    following_one = stream.follow(added)
    adding = asyncio.create_task(add_later())
    async with asyncio.timeout(5):
        item = await anext(following_one)
    assert isinstance(item, Entry)
    assert item.fields == {"data": "b"}
    await adding
    await following_one.aclose()


async def test_a_reader_goes_on_after_an_outage_without_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_redis()
    monkeypatch.setattr(module, "RETRY", 0.01)
    with RedisServer() as redis:
        async with make_client(redis.url) as client:
            stream = FollowedStream(client, NAME)
            ids = [EntryId(1, n) for n in range(1, 4)]
            await client.xadd(NAME, {"data": "a"}, id=str(ids[0]))
            feed = stream.follow(BEGINNING)
            assert await anext(feed) == Entry(ids[0], {"data": "a"})
            waiting = asyncio.ensure_future(anext(feed))
            await asyncio.sleep(0)
            redis.kill()
            while True:
                try:
                    await stream.end()
                except RedisConnectionError:
                    break
            redis.start()
            # The same entries, as in a Redis with persistence.
            for entry, value in zip(ids, "abc", strict=True):
                await client.xadd(NAME, {"data": value}, id=str(entry))
            async with asyncio.timeout(5):
                assert await waiting == Entry(ids[1], {"data": "b"})
            assert await anext(feed) == Entry(ids[2], {"data": "c"})
            await feed.aclose()


async def test_a_denied_stream_ends_its_readers(redis_url: str) -> None:
    require_redis()
    admin: Any = make_client(redis_url)
    async with admin:
        await admin.execute_command("ACL", "SETUSER", "blind", "on", "nopass", "+@all", "~other")
        url = redis_url.replace("//", "//blind:any@")
        async with make_client(url) as client:
            stream = FollowedStream(client, NAME)
            with pytest.raises(NoPermissionError):
                await stream.end()
            with pytest.raises(NoPermissionError):
                await anext(stream.follow(BEGINNING))
        await admin.acl_deluser("blind")
