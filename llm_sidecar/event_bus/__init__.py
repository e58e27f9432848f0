"""The event bus: text published to named channels over Redis pub/sub.

    bus = EventBus("redis://localhost:6379/0")
    await bus.start()  # or connect(), which raises when Redis is away
    await bus.subscribe("phi3.proposal.created", handler)
    await bus.publish("phi3.proposal.created", payload)
    await bus.close()

While Redis is unavailable, published messages wait, within bounds, and are sent in order
afterwards. Messages that others publish while this bus is not connected never reach it
(https://redis.io/docs/latest/develop/pubsub/). `EventBus.status` counts both losses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.event_bus.dead_letters import DeadLetters
from llm_sidecar.event_bus.followed_stream import FollowedStream
from llm_sidecar.event_bus.publisher import Publisher
from llm_sidecar.event_bus.redis_url import REPLY_TIMEOUT, make_client, masked
from llm_sidecar.event_bus.subscriber import PayloadQueue, Subscriber, cancel
from llm_sidecar.logs import start_detached

__all__ = ["EventBus", "Handler", "RedisError"]

Handler = Callable[[str], Awaitable[None]]
"""Takes the payload of one message."""

HANDLER_QUEUE: Final = 1_000
HANDLER_CHARACTERS: Final = 64 << 20
"""Maximum number of messages that wait for one handler, and of their characters in total; beyond
either, the oldest message is dropped."""
DRAIN_TIMEOUT: Final = 5.0
"""Seconds that handlers have to process waiting messages when the bus closes."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds after which the bus no longer waits for a cancelled task."""

log = logging.getLogger(__name__)


class EventBus:
    """Publishes to and listens on the channels of one Redis.

    Args:
        redis_url: `redis://`, `rediss://` or `unix://` as redis-py reads them; `memory://` is a
            Redis inside this process, private to this bus, and `memory://name` one that all buses
            with that name share.

    Raises:
        ValueError: the URL cannot be read; the message does not repeat it.
    """

    def __init__(self, redis_url: str = "redis://localhost:6379/0") -> None:
        self._client = make_client(redis_url)
        self._url = masked(redis_url)
        self.dead_letters = DeadLetters(self._client)
        self._subscriber = Subscriber(self._client, self._url)
        self._publisher = Publisher(self._client, self._subscriber)
        self._running: list[asyncio.Task[None]] = []
        self._handlers: dict[asyncio.Task[None], asyncio.Queue[str]] = {}
        self._handler_errors = 0
        self._refused_messages = 0
        self._closed = False

    async def connect(self) -> None:
        """Connect, and reconnect after every outage from then on.

        Raises:
            RedisError: Redis cannot be reached within a few seconds, or the bus is closed.
        """
        self._check_open()
        await self._client.ping()
        await self.start()
        # After a failed start the next attempt may be half a minute away.
        self._subscriber.hurry()
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                await self._subscriber.here.wait()
        except TimeoutError:
            raise RedisTimeoutError("Redis does not confirm the subscriptions") from None

    async def start(self) -> None:
        """Connect; while Redis is unavailable, keep trying in the background and do not raise.

        Returns after the first attempt, so that the next publish is sent if Redis is there.
        """
        if self._refused("start"):
            return
        if not self._running:
            self._running = [
                start_detached(self._subscriber.run(), name="event-bus subscriber"),
                start_detached(self._publisher.run(), name="event-bus publisher"),
            ]
        await self._subscriber.wait_attempted()

    async def publish(self, event_type: str, payload: str) -> bool:
        """Send a payload to a channel, in the order of the calls; return whether Redis accepted it.

        While Redis is unavailable, the message waits, within the bounds of
        `publisher.OUTBOX_MESSAGES`, and is sent when Redis is back. A message on `audio.bytes` does
        not wait. The first of several failures in a row is logged, every lost message is counted.

        Raises:
            TypeError: the payload is not a str.
        """
        if not isinstance(payload, str):
            raise TypeError(f"an event's payload is a str, not {type(payload).__name__}")
        try:
            self._check_open()
        except RedisError as error:
            self._publisher.refuse(event_type, error)
            return False
        return await self._publisher.publish(event_type, payload)

    async def subscribe(self, event_type: str, handler: Handler) -> None:
        """Call the handler with each payload of a channel, one after the other.

        An exception of a handler is logged and counted, and the handler gets the next message. A
        slow handler loses its oldest messages beyond `HANDLER_QUEUE`. Neither delays another
        handler.
        """
        if self._refused("subscribe"):
            return
        queue = PayloadQueue(HANDLER_QUEUE, HANDLER_CHARACTERS)
        serving = start_detached(
            self._serve(event_type, handler, queue), name=f"event-bus {event_type}"
        )
        self._handlers[serving] = queue
        await self._subscriber.add(event_type, queue)

    async def register_listener_queue(self, channel: str, queue: asyncio.Queue[str]) -> None:
        """Put each payload of a channel into the queue; a full queue loses its oldest, which is
        counted.

        Returns when Redis has confirmed the subscription, or at once while Redis is unavailable.
        """
        if not self._refused("register_listener_queue"):
            await self._subscriber.add(channel, queue)

    async def unregister_listener_queue(self, channel: str, queue: asyncio.Queue[str]) -> None:
        """Put nothing more into the queue, whether it is registered or not."""
        self._subscriber.discard(channel, queue)

    def refuse(self, event_type: str, reason: str) -> None:
        """Count and log a message that a subscriber does not accept.

        Args:
            event_type: its channel.
            reason: what is wrong with it, without any text of the message.
        """
        self._refused_messages += 1
        log.error("a message on %s is refused: %s", event_type, reason)

    async def close(self) -> None:
        """Give handlers a few seconds for the messages they have, then end all tasks."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._publisher.drain()
        except TimeoutError:
            log.warning("what waited for Redis was not sent within %.0f s", DRAIN_TIMEOUT)
        await cancel(*self._running, patience=CANCEL_TIMEOUT)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                for queue in self._handlers.values():
                    await queue.join()
        except TimeoutError:
            log.warning("event handlers did not finish within %.0f s", DRAIN_TIMEOUT)
        await cancel(*self._handlers, patience=CANCEL_TIMEOUT)
        await self._publisher.stop()  # a publish that runs ends first, within its reply timeout
        await self._client.aclose()

    def stream(self, name: str) -> FollowedStream:
        """A stream of this Redis."""
        return FollowedStream(self._client, name)

    @property
    def connected(self) -> bool:
        """Whether Redis is connected."""
        return self._subscriber.connected

    def status(self) -> dict[str, Any]:
        """The status for `/health`: the current connection, and counts since the bus was
        created."""
        return {
            "connected": self.connected,
            "url": self._url,
            "outages": self._subscriber.outages,
            "seconds_away": round(self._subscriber.seconds_away, 3),
            "published": self._publisher.published,
            "published_late": self._publisher.late,
            "waiting": self._publisher.waiting,
            "unpublished": self._publisher.lost,
            "handler_errors": self._handler_errors,
            "refused": self._refused_messages,
            "dropped": self._subscriber.dropped,
        }

    async def _serve(self, channel: str, handler: Handler, queue: asyncio.Queue[str]) -> None:
        while True:
            payload = await queue.get()
            try:
                await handler(payload)
            except (Exception, asyncio.CancelledError):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the bus closes; otherwise the handler's own work was cancelled
                self._handler_errors += 1
                log.exception("a handler of %s failed", channel)
            finally:
                queue.task_done()

    def _check_open(self) -> None:
        if self._closed:
            raise RedisError("the event bus is closed")

    def _refused(self, operation: str) -> bool:
        if self._closed:
            log.error("%s on an event bus that is closed", operation)
        return self._closed
