"""Reads a Redis stream for many readers, each at its own position, without losing entries.

    stream = FollowedStream(client, "osiris.events")
    async for item in stream.follow(await stream.end()):
        ...

A reader holds one page in memory. It holds no connection while it waits, because one task waits for
new entries for all readers.
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
from llm_sidecar.tasks import raise_if_cancelled

PAGE: Final = 16
"""Maximum number of entries that a reader holds; one entry can have hundreds of kilobytes."""
CONCURRENT_READS: Final = 8
"""Maximum number of connections that the readers use at once."""
WAIT_MS: Final = 2_000
"""Milliseconds for which Redis waits for a new entry; less than the reply timeout."""
PAUSE: Final = 0.02
"""Minimum seconds between two wake-ups of the readers, so that a burst wakes them only a few
times."""
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
"""The position before the first entry."""
_LAST: Final = EntryId((1 << 64) - 1, (1 << 64) - 1)
"""The largest id. Redis refuses to look for one after it."""


class Entry(NamedTuple):
    """An entry of a stream."""

    id: EntryId
    fields: dict[str, str]


class Gap(NamedTuple):
    """Entries between two ids may have been removed before they were read.

    Attributes:
        after: the id after which entries may be missing.
        to: the id at which the reader continues: the oldest entry, or the end of an empty stream.
            It is lower than `after` if the stream was created again, for example in another Redis.
    """

    after: EntryId
    to: EntryId


class Page(NamedTuple):
    """What follows an id.

    Attributes:
        items: oldest first; a gap comes only in front.
        position: the id after which the next page begins.
    """

    items: Sequence[Entry | Gap]
    position: EntryId


class FollowedStream:
    """Reads one stream.

    Args:
        client: must raise on errors, not retry.
        name: of the stream.
        polls: whether to poll instead of waiting in Redis. The Redis inside the process cannot
            cancel a read that waits.

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
        """Yields the entries after an id, then new ones as they are added. Waits during an outage
        of Redis.

        Ends only after `stop_following`.

        Raises:
            NoPermissionError: Redis denies it.
        """
        position = after
        with self._watched():
            while not self._ended:
                news = self._news
                try:
                    page = await self.page(position)
                except NoPermissionError:
                    raise
                except RedisError as error:
                    log.debug("a reader of %s waits: %s", self.name, error)
                    raise_if_cancelled()
                    await news.wait()
                    continue
                for item in page.items:
                    yield item
                position = page.position
                if not page.items:
                    raise_if_cancelled()
                    await news.wait()

    def stop_following(self) -> None:
        """Ends every `follow`, also later ones."""
        self._ended = True
        self._wake()

    async def page(self, after: EntryId, count: int = PAGE) -> Page:
        """At most `count` entries after an id.

        Raises:
            RedisError: Redis does not answer, or denies it.
        """
        start = str(after) if after == _LAST else f"({after}"
        # One transaction, so that no entry is removed between the two commands.
        async with self._reading, self._client.pipeline(transaction=True) as pipe:
            pipe.xinfo_stream(self.name)
            pipe.xrange(self.name, start, "+", count=count)
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
                # The next reader needs another one, even before this one has ended.
                self._watching = None

    async def _watch(self) -> None:
        while self._watching is asyncio.current_task():
            try:
                end = await self.end()
                self._wake()
                await asyncio.sleep(PAUSE)
                raise_if_cancelled()
                await self._wait_after(end)
            except RedisError as error:
                log.debug("the watcher of %s waits: %s", self.name, error)
                await asyncio.sleep(RETRY)

    async def _wait_after(self, end: EntryId) -> None:
        """Returns when there may be an entry after this id."""
        if not self._polls:
            await self._client.xread({self.name: str(end)}, count=1, block=WAIT_MS)
            return
        while await self.end() == end:
            raise_if_cancelled()
            await asyncio.sleep(POLL)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _is_missing(error: Exception) -> bool:
    """Whether an error of XINFO says that the stream does not exist."""
    return isinstance(error, ResponseError) and "no such key" in str(error)


def _page_of(info: dict[str, Any] | None, entries: list[Entry], after: EntryId) -> Page:
    """The page, with a gap in front if entries after `after` may have been removed.

    Args:
        info: the answer of XINFO STREAM; None if there is no stream.
        entries: the oldest ones after `after`.
        after: the id after which the reader continues.
    """
    last = BEGINNING if info is None else EntryId.parse(info["last-generated-id"])
    if after > last:
        return Page([Gap(after, last)], last)
    first = EntryId.parse(info["first-entry"][0]) if info and info["first-entry"] else last
    # In Redis 7, `entries-added` also counts removed entries. Redis 6.2 does not have it.
    is_whole = info is None or info.get("entries-added") == info["length"]
    items: list[Entry | Gap] = [Gap(after, first)] if after < first and not is_whole else []
    items += entries
    return Page(items, entries[-1].id if entries else max(after, first))
