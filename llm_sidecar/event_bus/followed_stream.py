"""Reads a Redis stream for many readers, each from a place of its own, and loses no entry.

    stream = FollowedStream(client, "osiris.events")
    async for item in stream.follow(await stream.end()):
        ...

A reader holds one page in memory, and no connection while it waits: one task waits in Redis for all
of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Final, NamedTuple, Self

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from llm_sidecar.logs import start_detached

PAGE: Final = 16
"""Entries that a reader holds at most; one can have hundreds of kilobytes."""
CONCURRENT_READS: Final = 8
"""Connections that readers use at once."""
WAIT_MS: Final = 2_000
"""How long Redis holds back an answer that there is nothing new; below its reply timeout."""
PAUSE: Final = 0.02
"""Seconds between two times that readers are woken, so that a burst wakes them seldom."""
POLL: Final = 0.05
"""Seconds."""
RETRY: Final = 1.0
"""Seconds between attempts while Redis does not answer."""

_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")

log = logging.getLogger(__name__)


class EntryId(NamedTuple):
    """The id of a stream entry, in the order of Redis.

    Attributes:
        milliseconds: usually since 1970.
        sequence: counts the entries of one millisecond.
    """

    milliseconds: int
    sequence: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `milliseconds-sequence`.

        Raises:
            ValueError: it is something else, or a number has more than 64 bits.
        """
        match = _ID.fullmatch(text)
        if match is None or max(numbers := (int(match[1]), int(match[2]))) >= 1 << 64:
            raise ValueError("not the id of a stream entry")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


BEGINNING: Final = EntryId(0, 0)
"""The place before every entry."""
_LAST: Final = EntryId((1 << 64) - 1, (1 << 64) - 1)
"""The largest id. Redis refuses to look for one after it."""


class Entry(NamedTuple):
    """An entry of a stream."""

    id: EntryId
    fields: dict[str, str]


class Gap(NamedTuple):
    """Entries between two ids may have been removed before they were read.

    Attributes:
        after: the id from which the reader went on.
        to: the id at which it goes on now: the oldest entry, or the end of an empty stream. It is
            below `after` if the stream has begun anew, for example in another Redis.
    """

    after: EntryId
    to: EntryId


class _Page(NamedTuple):
    items: Sequence[Entry | Gap]
    position: EntryId


class FollowedStream:
    """Reads one stream.

    Args:
        client: must raise on errors, not retry.
        name: of the stream.
        polls: whether to look again and again instead of waiting in Redis: the Redis inside the
            process ends no read that is cancelled.

    Attributes:
        name: of the stream.
    """

    def __init__(self, client: Redis, name: str, *, polls: bool = False) -> None:
        self.name = name
        self._client = client
        self._polls = polls
        self._news = asyncio.Event()
        self._reading = asyncio.Semaphore(CONCURRENT_READS)
        self._followers = 0
        self._watching: asyncio.Task[None] | None = None
        self._ended = False

    async def end(self) -> EntryId:
        """The id of the newest entry that the stream has had.

        Raises:
            RedisError: Redis does not answer, or denies it.
        """
        try:
            info = await self._client.xinfo_stream(self.name)
        except NoPermissionError:
            raise
        except ResponseError as error:
            if not _is_missing(error):
                raise
            return BEGINNING
        return EntryId.parse(info["last-generated-id"])

    async def follow(self, after: EntryId) -> AsyncGenerator[Entry | Gap, None]:
        """The entries after an id, and new ones as they are added, through outages of Redis.

        Ends only after `stop_following`.

        Raises:
            NoPermissionError: Redis denies it.
        """
        position = after
        with self._watched():
            while not self._ended:
                news = self._news
                try:
                    page = await self._page(position)
                except NoPermissionError:
                    raise
                except RedisError as error:
                    log.debug("a reader of %s waits: %s", self.name, error)
                    await news.wait()
                    continue
                for item in page.items:
                    yield item
                position = page.position
                if not page.items:
                    await news.wait()

    def stop_following(self) -> None:
        """Ends every `follow`, also later ones."""
        self._ended = True
        self._wake()

    async def _page(self, after: EntryId) -> _Page:
        """What follows an id. One transaction, so that nothing is removed in between."""
        start = str(after) if after == _LAST else f"({after}"
        async with self._reading, self._client.pipeline(transaction=True) as pipe:
            pipe.xinfo_stream(self.name)
            pipe.xrange(self.name, start, "+", count=PAGE)
            info, found = await pipe.execute(raise_on_error=False)
        if isinstance(info, Exception) and not _is_missing(info):
            raise info
        if isinstance(found, Exception):
            raise found
        entries = [Entry(EntryId.parse(entry), fields) for entry, fields in found]
        return _page_of(None if isinstance(info, Exception) else info, entries, after)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Wakes readers while there are any."""
        self._followers += 1
        if self._watching is None or self._watching.done():
            self._watching = start_detached(self._watch(), name=f"watcher of {self.name}")
        try:
            yield
        finally:
            self._followers -= 1
            if not self._followers:
                self._watching.cancel()

    async def _watch(self) -> None:
        # A cancellation can get lost, see `subscriber.cancel`.
        while self._followers:
            try:
                end = await self.end()
                self._wake()
                await asyncio.sleep(PAUSE)
                await self._wait_after(end)
            except RedisError as error:
                log.debug("the watcher of %s waits: %s", self.name, error)
                await asyncio.sleep(RETRY)

    async def _wait_after(self, end: EntryId) -> None:
        """Returns when there may be an entry after the end."""
        if not self._polls:
            await self._client.xread({self.name: str(end)}, count=1, block=WAIT_MS)
            return
        while self._followers and await self.end() == end:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _is_missing(error: Exception) -> bool:
    """Whether an error of XINFO says that nothing was added yet."""
    return isinstance(error, ResponseError) and "no such key" in str(error)


def _page_of(info: dict[str, Any] | None, entries: list[Entry], after: EntryId) -> _Page:
    """The page, with a gap in front if entries after `after` may have been removed.

    Args:
        info: the answer of XINFO STREAM; None if there is no stream.
        entries: the oldest ones after `after`.
        after: the id from which the reader goes on.
    """
    last = BEGINNING if info is None else EntryId.parse(info["last-generated-id"])
    if after > last:
        return _Page([Gap(after, last)], last)
    first = EntryId.parse(info["first-entry"][0]) if info and info["first-entry"] else last
    # Redis 7 counts the entries that it has removed, too.
    is_whole = info is None or info.get("entries-added") == info["length"]
    items: list[Entry | Gap] = [Gap(after, first)] if after < first and not is_whole else []
    items += entries
    return _Page(items, entries[-1].id if entries else max(after, first))
