"""The receiving side of the bus: one connection, whose messages go to the queues.

While the queue of a handler is full, the connection is not read. Redis then buffers messages up to
its `client-output-buffer-limit` for pub/sub.

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
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import NoPermissionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.payload_queue import PayloadQueue
from llm_sidecar.event_bus.redis_url import REPLY_TIMEOUT
from llm_sidecar.tasks import cancel

FIRST_DELAY: Final = 1.0
LONGEST_DELAY: Final = 30.0
SILENCE: Final = 10.0
"""Seconds after which an idle connection gets a ping."""
LONGEST_MESSAGE: Final = 16 << 20
"""Characters of a message; a longer one is refused."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Channel:
    """The queues of a channel, and whether Redis has confirmed or denied its subscription."""

    queues: set[asyncio.Queue[str]] = field(default_factory=set)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Subscriber:
    """Subscribes to the channels that have queues, on one connection, and reconnects after an
    outage.

    Args:
        client: provides the connection; it must raise on errors, not retry.
        name: of this Redis in log lines.
        denied: what Redis denies; a denied channel does not affect others.

    Attributes:
        here: set while Redis is connected and has answered every subscription.
        away: set while `here` is not.
        outages: the number of outages of Redis, including at the start.
        dropped: number of messages that a full queue lost.
        too_long: number of messages that were longer than `LONGEST_MESSAGE`.
        pauses: how often reading paused because a queue was full.
    """

    def __init__(self, client: Redis, name: str, denied: Denied) -> None:
        self.here = asyncio.Event()
        self.away = asyncio.Event()
        self.away.set()
        self.outages = 0
        self.dropped = 0
        self.too_long = 0
        self.pauses = 0
        self._client = client
        self._name = name
        self._denied = denied
        # On the current connection: the channels with a SUBSCRIBE command, and those of them that
        # Redis has not answered yet, in the order of the commands.
        self._held: set[str] = set()
        self._asked: deque[str] = deque()
        self._is_paused = False
        self._doubted = False
        self._channels: dict[str, _Channel] = {}
        self._attempted = asyncio.Event()
        self._hurried = asyncio.Event()
        self._heard = asyncio.Event()
        self._changed = asyncio.Event()
        self._away_since: float | None = None
        self._seconds_away = 0.0

    @property
    def connected(self) -> bool:
        """Whether Redis is connected, and has confirmed every subscription that it permits."""
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
        """Feed the queue; return when Redis has answered, or at once while Redis is unavailable."""
        channel = self._channels.setdefault(name, _Channel())
        channel.queues.add(queue)
        self._changed.set()
        if self.connected:
            try:
                await asyncio.wait_for(channel.answered.wait(), REPLY_TIMEOUT)
            except TimeoutError:
                self.check()

    def discard(self, name: str, queue: asyncio.Queue[str]) -> None:
        """Stop feeding the queue."""
        if name in self._channels:
            self._channels[name].queues.discard(queue)
            self._changed.set()

    def check(self) -> None:
        """Check the connection now: a sender has failed, and the reader may notice an outage much
        later."""
        self._doubted = True
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
            self._set_away()
            self._attempted.set()

    async def _session(self) -> None:
        """Connect, subscribe and dispatch until something fails."""
        async with self._client.pubsub() as pubsub:
            await pubsub.connect()
            self._held.clear()
            self._asked.clear()
            self._doubted = False
            tasks = [asyncio.create_task(job(pubsub)) for job in (self._receive, self._follow)]
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                ended.pop().result()
            finally:
                await cancel(*tasks, patience=0.5)

    async def _follow(self, pubsub: PubSub) -> None:
        """Keep Redis' subscriptions up to date; raise when Redis answers no more."""
        tried: set[str] = set()
        while True:
            self._changed.clear()
            for name, channel in list(self._channels.items()):
                if not channel.queues:
                    if name in self._held:
                        self._held.discard(name)
                        channel.answered.clear()
                        await pubsub.unsubscribe(name)
                elif name not in self._held and (
                    name not in tried or self._denied.permits(f"SUBSCRIBE {name}")
                ):
                    tried.add(name)
                    self._held.add(name)
                    self._asked.append(name)
                    await pubsub.subscribe(name)
            await self._wait_for_change()
            if self._doubted:
                self._doubted = False
                await self._check_alive(pubsub)

    async def _wait_for_change(self) -> None:
        try:
            async with asyncio.timeout(0 if self._doubted else SILENCE):
                await self._changed.wait()
        except TimeoutError:
            self._doubted = True

    async def _check_alive(self, pubsub: PubSub) -> None:
        """Ping Redis: a connection that only receives does not notice that its peer is dead."""
        self._heard.clear()
        await pubsub.ping()
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                await self._heard.wait()
        except TimeoutError:
            # While the reader waits for a full queue, it does not read the answer.
            if not self._is_paused:
                raise RedisTimeoutError("no answer to PING") from None

    async def _receive(self, pubsub: PubSub) -> None:
        while True:
            wanted = (channel for channel in self._channels.values() if channel.queues)
            if not self.connected and all(channel.answered.is_set() for channel in wanted):
                self._found()
            try:
                message = await pubsub.get_message(
                    timeout=None if self.connected else REPLY_TIMEOUT
                )
            except NoPermissionError:
                self._heard.set()
                if self._asked:  # otherwise Redis has denied PING
                    self._answered(self._asked.popleft(), permitted=False)
                continue
            if message is None:
                raise RedisTimeoutError("no answer to SUBSCRIBE")
            self._heard.set()
            name = message["channel"]
            if message["type"] == "subscribe":
                self._asked.popleft()
                self._answered(name, permitted=True)
            elif message["type"] == "message" and name in self._channels:
                await self._dispatch(name, message["data"])

    def _answered(self, name: str, *, permitted: bool) -> None:
        if permitted:
            self._denied.remove(f"SUBSCRIBE {name}")
        else:
            self._denied.add(f"SUBSCRIBE {name}")
            self._held.discard(name)
        if name in self._channels:
            self._channels[name].answered.set()

    async def _dispatch(self, name: str, payload: str) -> None:
        if len(payload) > LONGEST_MESSAGE:
            log.error("a message on %s is refused: it is too long", name)
            self.too_long += 1
            return
        for queue in list(self._channels[name].queues):
            if isinstance(queue, PayloadQueue):
                await self._hand_over(queue, payload)
                continue
            while queue.full():
                queue.get_nowait()
                queue.task_done()
                self.dropped += 1
            queue.put_nowait(payload)

    async def _hand_over(self, queue: PayloadQueue, payload: str) -> None:
        """Put a payload into the queue of a handler; wait while it is full."""
        if not queue.full():
            queue.put_nowait(payload)
            return
        self.pauses += 1
        self._is_paused = True
        try:
            await queue.put(payload)
        finally:
            self._is_paused = False

    def _found(self) -> None:
        if self._away_since is not None:
            seconds = time.monotonic() - self._away_since
            self._seconds_away += seconds
            self._away_since = None
            log.info("Redis is back at %s after %.1f s", self._name, seconds)
        self.here.set()
        self.away.clear()
        self._attempted.set()

    def _lost(self, error: Exception) -> None:
        self._set_away()
        self._attempted.set()
        for channel in self._channels.values():
            channel.answered.clear()
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

    def _set_away(self) -> None:
        self.here.clear()
        self.away.set()
