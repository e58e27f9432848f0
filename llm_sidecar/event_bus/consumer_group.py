"""One consumer of a consumer group: each entry of a Redis stream goes to one consumer.

    group = ConsumerGroup(client, blocking, "osiris.inbox", "osiris.sidecars")
    for entry in await group.read(100, block_seconds=2.0):
        ...
        await group.done(entry.id)

An entry stays pending until it is done. `claim` takes over the pending entries of a dead consumer
(https://redis.io/docs/latest/develop/data-types/streams/#consumer-groups). This needs Redis 6.2.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

FORGOTTEN_AFTER: Final = 24 * 3600.0
"""Seconds without a read after which a consumer is removed from the group."""


class Entry(NamedTuple):
    """An entry of a stream, and the number of its deliveries, including this one."""

    id: str
    fields: Mapping[str, str]
    deliveries: int


class ConsumerGroup:
    """One consumer of a group. Creates the stream and the group if they are missing; a new group
    starts at the first entry.

    Every method raises RedisError if Redis is away or denies the stream.

    Args:
        client: must raise on errors, not retry.
        blocking: the same with a longer timeout, for reads that wait.
        stream, group: names in Redis.

    Attributes:
        consumer: the name of this consumer, unique in the group.
    """

    def __init__(self, client: Redis, blocking: Redis, stream: str, group: str) -> None:
        self.stream = stream
        self.group = group
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._client = client
        self._blocking = blocking

    async def read(self, count: int, block_seconds: float) -> list[Entry]:
        """Entries that no consumer has read, oldest first, at most `count`.

        Waits up to `block_seconds` for the first one; at most `redis_url.LONGEST_BLOCK`.
        """
        reply = await self._in_group(
            lambda: self._blocking.xreadgroup(
                self.group,
                self.consumer,
                {self.stream: ">"},
                count=count,
                block=max(1, round(1000 * block_seconds)),
            )
        )
        return [
            Entry(entry_id, fields, 1) for _, entries in reply or () for entry_id, fields in entries
        ]

    async def claim(self, idle_seconds: float) -> Entry | None:
        """Takes over the oldest entry that has been pending for `idle_seconds` or more.

        One at a time: if an entry kills its consumers, only its own deliveries are counted.
        """
        start = "0-0"
        while True:
            take = partial(
                self._client.xautoclaim,
                self.stream,
                self.group,
                self.consumer,
                min_idle_time=round(1000 * idle_seconds),
                start_id=start,
                count=1,
            )
            reply = await self._in_group(take)
            start = reply[0]
            for entry_id, fields in reply[1]:
                if entry_id is not None:  # Redis 6.2 returns None for a deleted entry
                    return Entry(entry_id, fields, await self._deliveries(entry_id))
            if start == "0-0":
                return None

    async def again(self, entry: Entry) -> Entry:
        """The same entry, delivered once more."""
        await self._client.xclaim(
            self.stream, self.group, self.consumer, min_idle_time=0, message_ids=[entry.id]
        )
        return entry._replace(deliveries=entry.deliveries + 1)

    async def hold(self, ids: Sequence[str]) -> None:
        """Resets the idle time of these entries, so that no other consumer claims them."""
        await self._client.xclaim(
            self.stream,
            self.group,
            self.consumer,
            min_idle_time=0,
            message_ids=cast(Any, list(ids)),
            justid=True,
        )

    async def done(self, *ids: str) -> None:
        """Removes handled entries from the stream, so that it does not grow."""
        if ids:
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.xack(self.stream, self.group, *ids)
                pipe.xdel(self.stream, *ids)
                await pipe.execute()

    async def pending(self) -> int:
        """The number of entries that the group has read and not acknowledged."""
        summary = await self._in_group(lambda: self._client.xpending(self.stream, self.group))
        return int(summary["pending"])

    async def leave(self) -> None:
        """Removes this consumer from the group, and those that have read nothing for a day. A
        consumer with pending entries stays."""
        for consumer in await self._client.xinfo_consumers(self.stream, self.group):
            gone = consumer["idle"] > 1000 * FORGOTTEN_AFTER
            # Redis would forget the pending entries of a consumer that is deleted.
            if consumer["pending"] == 0 and (gone or consumer["name"] == self.consumer):
                await self._client.xgroup_delconsumer(self.stream, self.group, consumer["name"])

    async def _deliveries(self, entry_id: str) -> int:
        found = await self._client.xpending_range(
            self.stream, self.group, min=entry_id, max=entry_id, count=1
        )
        return int(found[0]["times_delivered"]) if found else 1

    async def _in_group(self, command: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await command()
        except ResponseError as error:
            # The group does not exist yet, or Redis was emptied.
            if not str(error).startswith("NOGROUP"):
                raise
        await self._create()
        return await command()

    async def _create(self) -> None:
        try:
            await self._client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except ResponseError as error:
            # Another consumer has just created it.
            if not str(error).startswith("BUSYGROUP"):
                raise
