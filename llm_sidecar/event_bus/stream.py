"""Reads the stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

_POLL: Final = 0.05


class EventStream:
    """The stream that keeps the events.

    Every method raises RedisError if Redis is away or denies the stream.

    Args:
        client: must raise on errors, not retry.
        blocking: the same with a longer timeout, for reads that wait.
        name: of the stream.
        polls: see `FollowedStream`.
    """

    def __init__(self, client: Redis, blocking: Redis, name: str, *, polls: bool) -> None:
        self.name = name
        self._client = client
        self._blocking = blocking
        self._polls = polls

    async def read(
        self, after: str, block_seconds: float, count: int = 100
    ) -> list[tuple[str, Mapping[str, str]]]:
        """The entries after an id, oldest first, each with its fields.

        Args:
            after: an id, or 0-0 for the beginning.
            block_seconds: how long to wait for the first one, up to `redis_url.LONGEST_BLOCK`.
                Each call that waits holds a connection.
            count: the maximum number of entries.
        """
        if not self._polls:
            block = max(1, round(1000 * block_seconds))
            return await self._read(self._blocking, after, count, block)
        end = time.monotonic() + block_seconds
        while not (entries := await self._read(self._client, after, count, None)):
            if time.monotonic() >= end:
                break
            await asyncio.sleep(_POLL)
        return entries

    async def last_id(self) -> str:
        """The id of the newest entry that was ever added, or 0-0."""
        try:
            return str((await self._client.xinfo_stream(self.name))["last-generated-id"])
        except ResponseError as error:
            if str(error) != "no such key":
                raise
            return "0-0"

    async def _read(
        self, client: Redis, after: str, count: int, block: int | None
    ) -> list[tuple[str, Mapping[str, str]]]:
        reply: Any = await client.xread({self.name: after}, count=count, block=block)
        return [(entry_id, fields) for _, entries in reply or () for entry_id, fields in entries]
