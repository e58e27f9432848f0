"""Requests for speech in Redis, 6.2 or later.

    osiris.speech               a stream: the ids of all requests that are not finished
    osiris.speech.request.<id>  a stream: one request, then its answers
    osiris.speech.workers       a sorted set: workers, by the time of their last heartbeat

The consumer group `chatterbox` gives each request to one worker. While it speaks, the worker renews
its claim. If the claim is stale, another worker claims the request, and reads in the stream of the
request which parts exist.

The stream of a request exists only while its sidecar reads it. Without the stream, a worker drops
the request. A sidecar cancels a request by deleting the stream; if the sidecar dies, the stream
expires.
"""

from __future__ import annotations

import logging
import re
import uuid
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from llm_sidecar.event_bus.consumer_group import ConsumerGroup

STREAM: Final = "osiris.speech"
GROUP: Final = "chatterbox"
WORKERS: Final = "osiris.speech.workers"
REQUEST_TTL: Final = 30
"""Seconds after the sidecar's last read until the stream of a request expires."""
BLOCK: Final = 1.0
"""Seconds that a read waits; less than `redis_url.REPLY_TIMEOUT`."""
SHOWN_FOR: Final = 10.0
"""Seconds after its last heartbeat for which a worker counts as running."""
MOST_WORKERS: Final = 100
"""Maximum number of workers that a sidecar reads."""

log = logging.getLogger(__name__)

_ID: Final = "id"
_DATA: Final = "data"
"""The fields of an entry of `STREAM`, and of an entry of a request's own stream."""
_REQUEST_ID: Final = re.compile(r"[0-9a-f]{32}")
_WORKER_ID: Final = re.compile(r"[!-~]{1,128}")


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
        """Appends a request to the queue."""
        request_id = uuid.uuid4().hex
        key = key_of(request_id)
        async with self._client.pipeline() as transaction:
            transaction.xadd(key, {_DATA: request})
            transaction.expire(key, REQUEST_TTL)
            transaction.xadd(STREAM, {_ID: request_id})
            position, _, entry = await transaction.execute()
        return Asked(key, entry, position)

    async def read(self, asked: Asked) -> str | None:
        """The next answer, or None if none comes within a second.

        Raises:
            KeyError: Redis no longer has the request.
        """
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.expire(asked.key, REQUEST_TTL)
            pipeline.xread({asked.key: asked.position}, count=1, block=round(1000 * BLOCK))
            is_there, streams = await pipeline.execute()
        if not is_there:
            raise KeyError(asked.key)
        if not streams:
            return None
        [(_, [(asked.position, fields)])] = streams
        answer: str = fields.get(_DATA, "")
        return answer

    async def is_waiting(self, asked: Asked, workers: int) -> bool:
        """Whether this many workers are all busy with other requests."""
        taken = await self._client.xpending_range(STREAM, GROUP, "-", "+", workers + 1)
        entries = {claim["message_id"] for claim in taken}
        return asked.entry not in entries and len(entries) >= workers

    async def remove(self, asked: Asked) -> None:
        """Removes a request, finished or not."""
        async with self._client.pipeline() as transaction:
            transaction.delete(asked.key)
            transaction.xack(STREAM, GROUP, asked.entry)
            transaction.xdel(STREAM, asked.entry)
            await transaction.execute()

    async def overview(self) -> tuple[dict[str, float], int]:
        """The running workers with the seconds since their last heartbeat, and the number of
        requests that are not finished."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.zrange(WORKERS, 0, MOST_WORKERS - 1, desc=True, withscores=True)
            pipeline.xlen(STREAM)
            time, workers, length = await pipeline.execute()
        now = _seconds(time)
        ages = {name: now - shown for name, shown in workers if _WORKER_ID.fullmatch(name)}
        # A time in the future was written before the clock was set back.
        return {name: age for name, age in ages.items() if abs(age) < SHOWN_FOR}, length


@dataclass(frozen=True, slots=True)
class Taken:
    """A request as its worker sees it.

    Attributes:
        entry: its id in `STREAM`.
        deliveries: how many workers have claimed it, including this one.
    """

    key: str
    entry: str
    deliveries: int


class Work:
    """The worker's side. Every method raises RedisError if Redis does not do it in time.

    Args:
        stale_after: seconds without a renewal after which another worker may claim a request.

    Attributes:
        worker_id: the name of the worker in the group and among `WORKERS`.
    """

    def __init__(self, client: Redis, stale_after: float) -> None:
        self._client = client
        self._group = ConsumerGroup(client, client, STREAM, GROUP)
        self._stale_after = stale_after
        self.worker_id = self._group.consumer

    async def show(self) -> None:
        """Sends a heartbeat, and removes workers that are long dead."""
        now = _seconds(await self._client.time())
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(WORKERS, {self.worker_id: now})
            pipeline.zremrangebyscore(WORKERS, "-inf", now - 10 * SHOWN_FOR)
            await pipeline.execute()

    async def leave(self) -> None:
        """Removes this worker from the list of workers and from the group."""
        await self._client.zrem(WORKERS, self.worker_id)
        await self._group.leave()

    async def take(self) -> Taken | None:
        """Claims a request of a dead worker, or else reads a new one; None if there is none within
        a second."""
        entry = await self._group.claim(self._stale_after)
        if entry is None:
            entry = next(iter(await self._group.read(1, BLOCK)), None)
        if entry is None:
            return None
        request_id = entry.fields.get(_ID, "")
        if _REQUEST_ID.fullmatch(request_id):
            return Taken(key_of(request_id), entry.id, entry.deliveries)
        log.error("an entry of %s is refused: it has no request id", STREAM)
        await self._group.done(entry.id)
        return None

    async def read(self, taken: Taken) -> tuple[str, str | None] | None:
        """The request, and its latest answer if there is one; None if its sidecar has gone."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xrange(taken.key, count=1)
            pipeline.xrevrange(taken.key, count=1)
            first, last = await pipeline.execute()
        if not first or not last:
            return None
        [(request_entry, request)], [(latest_entry, latest)] = first, last
        answer = None if latest_entry == request_entry else latest.get(_DATA, "")
        return request.get(_DATA, ""), answer

    async def keep(self, taken: Taken) -> bool:
        """Renews the claim. False if the sidecar has gone, or another worker has claimed the
        request."""
        if not await self._client.exists(taken.key):
            return False
        pending = await self._client.xpending_range(STREAM, GROUP, taken.entry, taken.entry, 1)
        owners = [(claim["consumer"], claim["times_delivered"]) for claim in pending]
        if owners != [(self.worker_id, taken.deliveries)]:
            return False
        await self._group.hold([taken.entry])
        return True

    async def answer(self, taken: Taken, answer: str) -> bool:
        """Adds an answer; False if the sidecar has gone."""
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
        """Makes the request available to other workers at once, without counting this delivery."""
        if await self.keep(taken):
            await self._client.xclaim(
                STREAM,
                GROUP,
                self.worker_id,
                min_idle_time=0,
                message_ids=[taken.entry],
                idle=round(1000 * self._stale_after),
                retrycount=taken.deliveries - 1,
                justid=True,
            )


def _seconds(time: tuple[int, int]) -> float:
    """The reply of TIME (seconds and microseconds) in seconds."""
    return time[0] + time[1] / 1e6
