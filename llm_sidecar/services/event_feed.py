"""Listeners of the events that are added to the stream, up to a limit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from redis.exceptions import NoPermissionError

from llm_sidecar.errors import QueueFull
from llm_sidecar.event_bus.followed_stream import Entry, EntryId, FollowedStream, Gap
from llm_sidecar.services.redis_errors import as_unavailable

log = logging.getLogger(__name__)

_RETRY_FULL: Final = 5

Feed = AsyncGenerator[Entry | Gap, None]


class EventFeed:
    """Opens feeds of one stream.

    Attributes:
        count: the number of listeners now.
    """

    def __init__(self, stream: FollowedStream, limit: int) -> None:
        self.count = 0
        self._stream = stream
        self._limit = limit

    async def check(self) -> None:
        """Checks whether a listener could join now.

        Raises:
            QueueFull: there are too many listeners.
            Unavailable: Redis does not answer, or denies it.
        """
        self._check_capacity()
        await self._end()

    @contextlib.asynccontextmanager
    async def listen(self, after: EntryId | None) -> AsyncIterator[Feed]:
        """The events after an id, or, if it is None, the events from now on.

        Raises:
            QueueFull: there are too many listeners.
            Unavailable: Redis does not answer, or denies it.
        """
        self._check_capacity()
        self.count += 1
        try:
            end = await self._end()
            start = end if after is None else after
            async with contextlib.aclosing(self._follow(start)) as feed:
                yield feed
        finally:
            self.count -= 1

    async def _follow(self, start: EntryId) -> Feed:
        """Ends when Redis denies the stream, because the response has begun."""
        async with contextlib.aclosing(self._stream.follow(start)) as feed:
            try:
                async for item in feed:
                    yield item
            except NoPermissionError:
                log.error("Redis denies reading %s now: a listener ends", self._stream.name)

    def drain(self) -> None:
        """Ends every feed, because the server shuts down."""
        self._stream.stop_following()

    def _check_capacity(self) -> None:
        if self.count >= self._limit:
            raise QueueFull(
                f"{self._limit} listeners are connected, which is MAX_EVENT_LISTENERS; try later.",
                retry_after=_RETRY_FULL,
            )

    async def _end(self) -> EntryId:
        with as_unavailable(f"the stream {self._stream.name}"):
            return await self._stream.end()
