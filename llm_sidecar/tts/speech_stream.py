"""Requests for speech in Redis, 6.2 or later.

    osiris.speech               a stream: the ids of all requests that are not finished
    osiris.speech.request.<id>  a stream: one request, then its answers
    osiris.speech.workers       a sorted set: workers, by the time when each last showed itself

The consumer group `chatterbox` gives each request to one worker. While it speaks, the worker keeps
its claim fresh. A request whose claim is stale goes to another worker, which reads in the stream of
the request how far the first one came.

The stream of a request lives only as long as the sidecar reads it. Without it nobody listens, so a
worker drops the request: this is how a sidecar cancels, on purpose or by dying.
"""

from __future__ import annotations

import logging
import re
import uuid
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

STREAM: Final = "osiris.speech"
GROUP: Final = "chatterbox"
WORKERS: Final = "osiris.speech.workers"

CONSUMER: Final = "worker"
"""All workers are one consumer of the group, so dead ones leave nothing behind in it. The number of
a request's deliveries tells its present worker from former ones."""
LISTENED_FOR: Final = 30
"""Seconds for which the stream of a request lives after the sidecar has last read it."""
BLOCK: Final = 1_000
"""Milliseconds that a read waits; less than `redis_url.REPLY_TIMEOUT`."""
SHOWN_FOR: Final = 6.0
"""Seconds for which a worker counts as running after it has shown itself."""
MOST_WORKERS: Final = 100
"""Maximum number of workers that a sidecar looks at."""

log = logging.getLogger(__name__)

_ID: Final = "id"
_DATA: Final = "data"
"""The fields of an entry of `STREAM`, and of an entry of a request's own stream."""
_REQUEST_ID: Final = re.compile(r"[0-9a-f]{32}")
_WORKER_ID: Final = re.compile(r"[!-~]{1,64}")


def key_of(request_id: str) -> str:
    """The stream of a request and its answers."""
    return f"osiris.speech.request.{request_id}"


@dataclass(slots=True)
class Asked:
    """A request as its sidecar sees it.

    Attributes:
        entry: its id in `STREAM`.
        position: the last entry that was read of its own stream.
    """

    key: str
    entry: str
    position: str


class Requests:
    """The sidecar's side. Every method raises RedisError if Redis does not do it in time."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def add(self, request: str) -> Asked:
        """Adds a request as the last one."""
        request_id = uuid.uuid4().hex
        key = key_of(request_id)
        async with self._client.pipeline() as transaction:
            transaction.xadd(key, {_DATA: request})
            transaction.expire(key, LISTENED_FOR)
            transaction.xadd(STREAM, {_ID: request_id})
            position, _, entry = await transaction.execute()
        return Asked(key, entry, position)

    async def read(self, asked: Asked) -> str | None:
        """The next answer, or None if none comes within a second.

        Raises:
            KeyError: Redis no longer has the request.
        """
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.expire(asked.key, LISTENED_FOR)
            pipeline.xread({asked.key: asked.position}, count=1, block=BLOCK)
            is_there, streams = await pipeline.execute()
        if not is_there:
            raise KeyError(asked.key)
        if not streams:
            return None
        [(_, [(asked.position, fields)])] = streams
        answer: str = fields.get(_DATA, "")
        return answer

    async def is_begun(self, asked: Asked) -> bool:
        """Whether a worker has taken the request."""
        return bool(await self._client.xpending_range(STREAM, GROUP, asked.entry, asked.entry, 1))

    async def remove(self, asked: Asked) -> None:
        """Removes a request, finished or not."""
        async with self._client.pipeline() as transaction:
            transaction.delete(asked.key)
            transaction.xack(STREAM, GROUP, asked.entry)
            transaction.xdel(STREAM, asked.entry)
            await transaction.execute()

    async def overview(self) -> tuple[dict[str, float], int]:
        """The running workers, with the seconds since each has shown itself, and the number of
        requests that are not finished."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.zrange(WORKERS, 0, MOST_WORKERS - 1, desc=True, withscores=True)
            pipeline.xlen(STREAM)
            (seconds, microseconds), workers, length = await pipeline.execute()
        now = seconds + microseconds / 1e6
        ages = {name: now - shown for name, shown in workers if _WORKER_ID.fullmatch(name)}
        # A time in the future is from before a jump of the clock.
        return {name: age for name, age in ages.items() if abs(age) < SHOWN_FOR}, length


@dataclass(frozen=True, slots=True)
class Taken:
    """A request as its worker sees it.

    Attributes:
        entry: its id in `STREAM`.
        deliveries: how many workers have had it, this one included.
    """

    key: str
    entry: str
    deliveries: int


class Work:
    """The worker's side. Every method raises RedisError if Redis does not do it in time.

    Args:
        stale_after: seconds without a sign of its worker, after which another one takes a request.
    """

    def __init__(self, client: Redis, stale_after: float) -> None:
        # redis-py's types also cover clients that answer bytes.
        self._client: Any = client
        self._stale = round(1000 * stale_after)

    async def join(self) -> None:
        """Creates the group, unless it is there."""
        try:
            await self._client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def show(self, worker_id: str) -> None:
        """Tells sidecars that this worker is running; forgets those that are long dead."""
        seconds, microseconds = await self._client.time()
        now = seconds + microseconds / 1e6
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(WORKERS, {worker_id: now})
            pipeline.zremrangebyscore(WORKERS, "-inf", now - 10 * SHOWN_FOR)
            await pipeline.execute()

    async def hide(self, worker_id: str) -> None:
        """Tells sidecars that this worker is about to end."""
        await self._client.zrem(WORKERS, worker_id)

    async def take(self) -> Taken | None:
        """Takes a request of a dead worker, or else a new one; None if there is none for a
        second."""
        stale = await self._client.xpending_range(STREAM, GROUP, "-", "+", 1, idle=self._stale)
        if stale:
            entry, deliveries = stale[0]["message_id"], stale[0]["times_delivered"] + 1
            entries = await self._client.xclaim(STREAM, GROUP, CONSUMER, self._stale, [entry])
        else:
            streams = await self._client.xreadgroup(
                GROUP, CONSUMER, {STREAM: ">"}, count=1, block=BLOCK
            )
            entries, deliveries = streams[0][1] if streams else [], 1
        if not entries:
            return None
        # Redis 6.2 gives a deleted entry as None.
        entry, fields = entries[0] if entries[0][1] is not None else (entry, {})
        taken = Taken(key_of(fields.get(_ID, "")), entry, deliveries)
        if not _REQUEST_ID.fullmatch(fields.get(_ID, "")):
            log.error("an entry of %s is refused: it has no id of a request", STREAM)
            await self.finish(taken)
            return None
        return taken

    async def read(self, taken: Taken) -> tuple[str, str] | None:
        """The request and its latest answer, which is the request itself if there is none; None if
        nobody listens."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xrange(taken.key, count=1)
            pipeline.xrevrange(taken.key, count=1)
            first, last = await pipeline.execute()
        if not first or not last:
            return None
        return first[0][1].get(_DATA, ""), last[0][1].get(_DATA, "")

    async def keep(self, taken: Taken) -> bool:
        """Keeps the claim fresh. False if there is none: nobody listens, or another worker has
        it."""
        if not await self._client.exists(taken.key):
            return False
        pending = await self._client.xpending_range(STREAM, GROUP, taken.entry, taken.entry, 1)
        if not pending or pending[0]["times_delivered"] != taken.deliveries:
            return False
        await self._client.xclaim(STREAM, GROUP, CONSUMER, 0, [taken.entry], justid=True)
        return True

    async def answer(self, taken: Taken, answer: str) -> bool:
        """Adds an answer; False if nobody listens."""
        return bool(await self._client.xadd(taken.key, {_DATA: answer}, nomkstream=True))

    async def finish(self, taken: Taken, answer: str | None = None) -> None:
        """Removes a request, after its last answer if there is one."""
        async with self._client.pipeline() as transaction:
            if answer is not None:
                transaction.xadd(taken.key, {_DATA: answer}, nomkstream=True)
            transaction.xack(STREAM, GROUP, taken.entry)
            transaction.xdel(STREAM, taken.entry)
            await transaction.execute()

    async def hand_back(self, taken: Taken) -> None:
        """Lets another worker take the request now, as if this one had never had it."""
        if await self.keep(taken):
            await self._client.xclaim(
                STREAM,
                GROUP,
                CONSUMER,
                0,
                [taken.entry],
                idle=self._stale,
                retrycount=taken.deliveries - 1,
                justid=True,
            )
