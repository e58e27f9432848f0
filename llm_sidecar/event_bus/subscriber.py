"""The receiving half of the bus: one connection, whose messages go to the queues.

One task reads the connection, and one other task writes to it. So a caller that is cancelled in the
middle of a registration cannot break the connection for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import time
from dataclasses import dataclass, field
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.event_bus.redis_url import REPLY_TIMEOUT

FIRST_DELAY: Final = 1.0
LONGEST_DELAY: Final = 30.0
SILENCE: Final = 10.0
"""Seconds after which an idle connection gets a ping."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Channel:
    """The queues of a channel, and whether Redis has confirmed our subscription to it."""

    queues: set[asyncio.Queue[str]] = field(default_factory=set)
    live: asyncio.Event = field(default_factory=asyncio.Event)


class PayloadQueue(asyncio.Queue[str]):
    """A queue of payloads, bounded by their number and by the sum of their characters."""

    def __init__(self, messages: int, characters: int) -> None:
        super().__init__(messages)
        self._most = characters
        self._held = 0

    def full(self) -> bool:
        """Whether one more payload would exceed a bound."""
        return super().full() or self._held >= self._most

    def _put(self, item: str) -> None:
        self._held += len(item)
        super()._put(item)

    def _get(self) -> str:
        payload = super()._get()
        self._held -= len(payload)
        return payload


class Subscriber:
    """Subscribes to the channels that have queues, on one connection, and reconnects after an
    outage.

    Args:
        client: provides the connection; it must raise on errors, not retry.
        name: of this Redis in log lines.

    Attributes:
        here: set while Redis is connected and has confirmed every subscription.
        outages: the number of outages of Redis, including at the start.
        dropped: number of messages that a full queue lost.
    """

    def __init__(self, client: Redis, name: str) -> None:
        self.here = asyncio.Event()
        self.outages = 0
        self.dropped = 0
        self._client = client
        self._name = name
        self._channels: dict[str, _Channel] = {}
        self._attempted = asyncio.Event()
        self._hurried = asyncio.Event()
        self._heard = asyncio.Event()
        self._changed = asyncio.Event()
        self._trouble: Exception | None = None
        self._away_since: float | None = None
        self._seconds_away = 0.0

    @property
    def connected(self) -> bool:
        """Whether Redis is connected and has confirmed every subscription."""
        return self.here.is_set()

    @property
    def seconds_away(self) -> float:
        """Seconds of all outages, including one that lasts."""
        since = self._away_since
        return self._seconds_away + (0.0 if since is None else time.monotonic() - since)

    async def wait_attempted(self) -> None:
        """Return once the first attempt to connect has succeeded or failed."""
        await self._attempted.wait()

    def hurry(self) -> None:
        """Try to connect now; the caller knows that Redis is there."""
        self._hurried.set()

    async def add(self, name: str, queue: asyncio.Queue[str]) -> None:
        """Feed the queue; return when Redis has confirmed it, or at once while Redis is
        unavailable."""
        channel = self._channels.setdefault(name, _Channel())
        channel.queues.add(queue)
        self._changed.set()
        if self.connected:
            try:
                await asyncio.wait_for(channel.live.wait(), REPLY_TIMEOUT)
            except TimeoutError:
                self.restart(RedisTimeoutError(f"no answer to SUBSCRIBE {name}"))

    def discard(self, name: str, queue: asyncio.Queue[str]) -> None:
        """Stop feeding the queue."""
        if name in self._channels:
            self._channels[name].queues.discard(queue)
            self._changed.set()

    def restart(self, error: Exception) -> None:
        """Reconnect: a sender found Redis unavailable, which the reader may notice much later."""
        if self.connected:
            self._lost(error)
            self._trouble = error
            self._changed.set()

    async def run(self) -> None:
        """Keep a connection and dispatch its messages, until cancelled."""
        try:
            delay = FIRST_DELAY
            while True:
                outages = self.outages
                try:
                    await self._session()
                except Exception as error:  # noqa: BLE001 - after any error the connection is made again
                    self._lost(error)
                if self.outages > outages:  # it was connected until now, or never
                    delay = FIRST_DELAY
                self._hurried.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay * random.uniform(0.5, 1.0)):
                        await self._hurried.wait()
                delay = min(2 * delay, LONGEST_DELAY)
        finally:
            self.here.clear()
            self._attempted.set()

    async def _session(self) -> None:
        """Connect, subscribe and dispatch until something fails."""
        async with self._client.pubsub() as pubsub:
            await pubsub.connect()
            self._trouble = None
            tasks = [asyncio.create_task(job(pubsub)) for job in (self._receive, self._follow)]
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                ended.pop().result()
            finally:
                await cancel(*tasks, patience=0.5)

    async def _follow(self, pubsub: PubSub) -> None:
        """Keep Redis' subscriptions up to date; raise errors that senders reported."""
        held: set[str] = set()
        while True:
            self._changed.clear()
            if self._trouble is not None:
                raise self._trouble
            for name, channel in list(self._channels.items()):
                if channel.queues and name not in held:
                    held.add(name)
                    await pubsub.subscribe(name)
                elif name in held and not channel.queues:
                    held.discard(name)
                    channel.live.clear()
                    await pubsub.unsubscribe(name)
            try:
                async with asyncio.timeout(SILENCE):
                    await self._changed.wait()
            except TimeoutError:
                await self._check_alive(pubsub)

    async def _check_alive(self, pubsub: PubSub) -> None:
        """Ping Redis: a connection that only receives does not notice that its peer is dead."""
        self._heard.clear()
        await pubsub.ping()
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                await self._heard.wait()
        except TimeoutError:
            raise RedisTimeoutError("no answer to PING") from None

    async def _receive(self, pubsub: PubSub) -> None:
        while True:
            wanted = (channel for channel in self._channels.values() if channel.queues)
            if not self.connected and all(channel.live.is_set() for channel in wanted):
                self._found()
            message = await pubsub.get_message(timeout=None if self.connected else REPLY_TIMEOUT)
            if message is None:
                raise RedisTimeoutError("no answer to SUBSCRIBE")
            self._heard.set()
            channel = self._channels.get(message["channel"])
            if channel is not None and message["type"] == "subscribe":
                channel.live.set()
            elif channel is not None and message["type"] == "message":
                self._dispatch(channel, message["data"])

    def _dispatch(self, channel: _Channel, payload: str) -> None:
        for queue in channel.queues:
            while queue.full():
                queue.get_nowait()
                queue.task_done()
                self.dropped += 1
            queue.put_nowait(payload)

    def _found(self) -> None:
        if self._away_since is not None:
            seconds = time.monotonic() - self._away_since
            self._seconds_away += seconds
            self._away_since = None
            log.info("Redis is back at %s after %.1f s", self._name, seconds)
        self.here.set()
        self._attempted.set()

    def _lost(self, error: Exception) -> None:
        self.here.clear()
        self._attempted.set()
        for channel in self._channels.values():
            channel.live.clear()
        if self._away_since is None:
            self._away_since = time.monotonic()
            self.outages += 1
            # An outage concerns every request, so the line has no request id.
            contextvars.Context().run(
                log.error,
                "Redis is away at %s, trying again until it is back: %s",
                self._name,
                error,
            )


async def cancel(*tasks: asyncio.Task[None], patience: float) -> None:
    """Cancel tasks and return when they have ended, or after `patience` seconds.

    Each task is cancelled ten times, because a cancellation can get lost: `wait_for` of Python
    3.11, with which redis-py sends, swallows it if it arrives as the sending ends
    (https://github.com/python/cpython/issues/86296).
    """
    for _ in range(10):
        if not (pending := [task for task in tasks if not task.done()]):
            break
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=patience / 10)
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a task of the event bus ended with %r", error)
