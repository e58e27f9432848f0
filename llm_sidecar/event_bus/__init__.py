"""The event bus: text published to named channels over Redis pub/sub.

    bus = EventBus("redis://localhost:6379/0")
    await bus.start()  # or connect(), which raises when Redis is away
    await bus.subscribe("phi3.proposal.created", handler)
    await bus.publish("phi3.proposal.created", payload)
    await bus.close()

Delivery is at most once: what is published while a subscriber is away never reaches it
(https://redis.io/docs/latest/develop/pubsub/). `EventBus.status` shows such gaps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.event_bus.redis_url import make_client, masked
from llm_sidecar.event_bus.subscriber import Subscriber, cancel

__all__ = ["EventBus", "Handler", "RedisError"]

Handler = Callable[[str], Awaitable[None]]
"""Takes the payload of one message."""

HANDLER_QUEUE: Final = 1_000
"""Messages that wait for one handler before its oldest is dropped."""
DRAIN_TIMEOUT: Final = 5.0
"""Seconds that handlers have at the close to finish what waits for them."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds after which a task that resists being cancelled is left behind."""

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
        self._subscriber = Subscriber(self._client, self._url)
        self._running: asyncio.Task[None] | None = None
        self._handlers: dict[asyncio.Task[None], asyncio.Queue[str]] = {}
        self._publishing = asyncio.Lock()
        self._publish_failed = False
        self._unpublished = 0
        self._handler_errors = 0
        self._closed = False

    async def connect(self) -> None:
        """Connect, and stay connected from then on.

        Raises:
            RedisError: Redis cannot be reached within a few seconds, or the bus is closed.
        """
        self._check_open()
        await self._client.ping()
        await self.start()

    async def start(self) -> None:
        """Connect, or while Redis is away keep trying in the background; never raises for that.

        Returns after the first attempt, so that with Redis there the next publish is sent.
        """
        if self._refused("start"):
            return
        if self._running is None:
            self._running = asyncio.create_task(self._subscriber.run(), name="event-bus")
        await self._subscriber.wait_attempted()

    async def publish(self, event_type: str, payload: str) -> bool:
        """Send a payload to a channel, in the order of the calls, and say whether Redis took it.

        False when it did not: each such message is counted, and the first of a row is logged.

        Raises:
            TypeError: the payload is not a str.
        """
        if not isinstance(payload, str):
            raise TypeError(f"an event's payload is a str, not {type(payload).__name__}")
        try:
            async with self._publishing:
                self._check_open()
                if not self._subscriber.connected:
                    raise RedisConnectionError("not connected")
                await self._client.publish(event_type, payload)
        except RedisError as error:
            if isinstance(error, RedisConnectionError | RedisTimeoutError):
                self._subscriber.restart(error)
            if self._closed or not self._publish_failed:
                log.error("not published to %s, more are only counted: %s", event_type, error)
            self._publish_failed = True
            self._unpublished += 1
            return False
        self._publish_failed = False
        return True

    async def subscribe(self, event_type: str, handler: Handler) -> None:
        """Call the handler with each payload of a channel, one after the other.

        A handler that raises is logged and counted, and gets the next message. One that is slow
        loses its own oldest messages beyond `HANDLER_QUEUE`. No other handler feels either.
        """
        if self._refused("subscribe"):
            return
        queue: asyncio.Queue[str] = asyncio.Queue(HANDLER_QUEUE)
        serving = asyncio.create_task(
            self._serve(event_type, handler, queue), name=f"event-bus {event_type}"
        )
        self._handlers[serving] = queue
        await self._subscriber.add(event_type, queue)

    async def register_listener_queue(self, channel: str, queue: asyncio.Queue[str]) -> None:
        """Put each payload of a channel into the queue; a full one loses its oldest, counted.

        Returns when Redis has confirmed the subscription, or at once while it is away.
        """
        if not self._refused("register_listener_queue"):
            await self._subscriber.add(channel, queue)

    async def unregister_listener_queue(self, channel: str, queue: asyncio.Queue[str]) -> None:
        """Put nothing more into the queue; one that is not registered is no error."""
        self._subscriber.discard(channel, queue)

    async def close(self) -> None:
        """Let handlers finish what they have within a few seconds, then leave nothing behind."""
        if self._closed:
            return
        self._closed = True
        if self._running is not None:
            await cancel(self._running, patience=CANCEL_TIMEOUT)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                for queue in self._handlers.values():
                    await queue.join()
        except TimeoutError:
            log.warning("event handlers did not finish within %.0f s", DRAIN_TIMEOUT)
        await cancel(*self._handlers, patience=CANCEL_TIMEOUT)
        async with self._publishing:  # a publish under way ends first, and that soon
            await self._client.aclose()

    def status(self) -> dict[str, Any]:
        """What `/health` shows: the connection now, and counts since the bus was made."""
        return {
            "connected": self._subscriber.connected,
            "url": self._url,
            "outages": self._subscriber.outages,
            "seconds_away": round(self._subscriber.seconds_away, 3),
            "unpublished": self._unpublished,
            "handler_errors": self._handler_errors,
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
                    raise  # the bus closes; otherwise it is only what the handler waited for
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
