"""The event bus: events in a Redis stream and on its channels, and entries of the inbox.

    bus = EventBus("redis://localhost:6379/0")
    await bus.start()  # or connect(), which raises when Redis is away
    await bus.subscribe("phi3.proposal.created", handler)
    await bus.publish("phi3.proposal.created", payload)
    await bus.close()

Publishing never waits for Redis: events wait in an outbox, and a relay sends them in order.
Messages that others publish while this bus is not connected never reach it
(https://redis.io/docs/latest/develop/pubsub/). `EventBus.status` counts what is lost.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from typing import Any, Final

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.event_bus.consumer_group import ConsumerGroup
from llm_sidecar.event_bus.dead_letters import INBOX, DeadLetters
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.fact_watcher import FactWatcher
from llm_sidecar.event_bus.facts import Facts
from llm_sidecar.event_bus.followed_stream import FollowedStream
from llm_sidecar.event_bus.handlers import BatchHandler, Handler, Handlers
from llm_sidecar.event_bus.inbox import GROUP, Inbox, InboxHandler
from llm_sidecar.event_bus.leases import Leases
from llm_sidecar.event_bus.outbox import Outbox
from llm_sidecar.event_bus.payload_queue import PayloadQueue
from llm_sidecar.event_bus.publisher import SOURCE, Publisher
from llm_sidecar.event_bus.redis_url import (
    LONGEST_BLOCK,
    MEMORY,
    REPLY_TIMEOUT,
    close_client,
    make_client,
    masked,
)
from llm_sidecar.event_bus.request_records import RequestRecords
from llm_sidecar.event_bus.server_check import durability
from llm_sidecar.event_bus.subscriber import Subscriber
from llm_sidecar.logs import start_detached
from llm_sidecar.tasks import cancel

__all__ = ["SOURCE", "BatchHandler", "EventBus", "Handler", "InboxHandler", "RedisError"]

HANDLER_QUEUE: Final = 100_000
HANDLER_CHARACTERS: Final = 64 << 20
"""Maximum number of messages that wait for one handler, and of their characters in total; beyond
either, the bus reads no further."""
BATCH: Final = 500
"""Maximum number of messages that a handler of batches gets at once."""
MEMORY_MAXLEN: Final = 1_000
"""Maximum number of events in the stream of a bus inside the process."""
DRAIN_TIMEOUT: Final = 5.0
"""When the bus closes, it waits this many seconds for events to be sent, and then for handlers."""
CANCEL_TIMEOUT: Final = 5.0
"""Seconds after which the bus no longer waits for a cancelled task."""

log = logging.getLogger(__name__)


class EventBus:
    """Publishes to and listens on the channels of one Redis.

    Args:
        redis_url: `redis://`, `rediss://`, `unix://` or `redis+sentinel://`, see
            `llm_sidecar.redis_address`; or `memory://`, a Redis inside this process, private to
            this bus, or `memory://name`, one that all buses with that name share.
        stream: the name of the Redis stream that keeps the events. It begins the names of all keys
            that the sidecars share.
        stream_maxlen: about how many of them it keeps.
        outbox: a durable outbox whose events this bus sends too. Close the bus before its owner.

    Attributes:
        events: reads the stream of events.
        dead_letters: entries of the inbox that no sidecar could store.
        facts, watcher: values that all sidecars of this Redis agree on, and their changes.
        leases: locks between machines.
        requests: with an `Idempotency-Key`.

    Raises:
        ValueError: the URL cannot be read; the message does not repeat it.
    """

    def __init__(
        self,
        redis_url: str = "redis://localhost:6379/0",
        *,
        stream: str = "osiris.events",
        stream_maxlen: int = 100_000,
        outbox: Outbox | None = None,
    ) -> None:
        self._url = masked(redis_url)
        self._in_memory = redis_url.startswith(MEMORY)
        # Both clients have to use the same Redis in memory.
        url = f"{MEMORY}{uuid.uuid4()}" if redis_url == MEMORY else redis_url
        self._client = make_client(url)
        self._blocking = make_client(url, blocks=LONGEST_BLOCK)
        self._denied = Denied()
        self._subscriber = Subscriber(self._client, self._url, self._denied)
        maxlen = min(stream_maxlen, MEMORY_MAXLEN) if self._in_memory else stream_maxlen
        self._publisher = Publisher(
            self._client,
            self._subscriber,
            self._denied,
            stream=stream,
            maxlen=maxlen,
            outbox=outbox,
        )
        self._handlers = Handlers()
        self.events = FollowedStream(self._client, stream, polls=self._in_memory)
        self.dead_letters = DeadLetters(self._client)
        self.facts = Facts(self._client, stream, maxlen)
        self.watcher = FactWatcher(self.facts, self._subscriber, self._denied)
        self.leases = Leases(self._client, stream)
        self.requests = RequestRecords(
            self._client, self._subscriber, self._denied, stream, shares=redis_url != MEMORY
        )
        self._inbox: Inbox | None = None
        # `memory://` has no options, and keeps nothing anyway.
        self._needs_durability = outbox is not None and not self._in_memory
        self._warnings: list[str] = []
        self._running: list[asyncio.Task[None]] = []
        self._refused_messages = 0
        self._closed = False

    async def connect(self) -> None:
        """Connect, and reconnect after every outage from then on.

        Raises:
            RedisError: Redis cannot be reached within a few seconds, or the bus is closed.
        """
        if self._closed:
            raise RedisError("the event bus is closed")
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
            self._run("subscriber", self._subscriber.run())
            for name, job in self._publisher.jobs().items():
                self._run(name, job)
            self._run("fact watcher", self.watcher.run())
            self._run("requests", self.requests.run())
            if self._needs_durability:
                self._run("server check", self._check_server())
            if self._inbox is not None:
                self._run("inbox", self._inbox.run())
        await self._subscriber.wait_attempted()

    async def publish(self, event_type: str, payload: str) -> bool:
        """Send a payload to a channel and into the stream, in the order of the calls.

        It never waits for Redis. An event waits, within the bounds of `publisher.OUTBOX_MESSAGES`,
        until Redis has it. A message on a channel of `live.LIVE_ONLY` is not added to the
        stream, and is lost while Redis is unavailable. Every lost message is counted.

        Returns:
            True if Redis is connected, so that the message is sent now.

        Raises:
            TypeError: the payload is not a str.
        """
        if not isinstance(payload, str):
            raise TypeError(f"an event's payload is a str, not {type(payload).__name__}")
        # Nothing below awaits, so a caller in a loop would starve the tasks of the connection.
        await asyncio.sleep(0)
        if self._closed:
            self._publisher.refuse(event_type, "the event bus is closed")
            return False
        return self._publisher.publish(event_type, payload)

    def send(self, event: CloudEvent) -> None:
        """Send an event as `publish` does: it waits in memory until Redis has it."""
        if self._closed:
            self._publisher.refuse(event.type, "the event bus is closed")
        else:
            self._publisher.send(event)

    async def subscribe(self, event_type: str, handler: Handler) -> None:
        """Call the handler with each payload of a channel, one after the other.

        An exception of a handler is logged and counted, and the handler gets the next message. A
        slow handler delays no other one until `HANDLER_QUEUE` messages wait for it; then the bus
        reads no further until it has taken one.
        """

        async def handle(payloads: list[str]) -> None:
            await handler(payloads[0])

        await self._subscribe(event_type, handle, 1)

    async def subscribe_batches(self, event_type: str, handler: BatchHandler) -> None:
        """Call the handler with the payloads of a channel that have arrived, at most `BATCH`.

        The rest is as in `subscribe`.
        """
        await self._subscribe(event_type, handler, BATCH)

    async def read_inbox(self, handler: InboxHandler) -> None:
        """Call the handler with the entries of the inbox; see `Inbox`.

        A `memory://` bus has no inbox, because no other process could write to it.
        """
        if self._refused("read_inbox") or self._in_memory:
            return
        group = ConsumerGroup(self._client, self._blocking, INBOX, GROUP)
        self._inbox = Inbox(group, self.dead_letters, handler, self._subscriber, self._denied)
        if self._running:
            self._run("inbox", self._inbox.run())

    async def register_listener_queue(self, channel: str, queue: asyncio.Queue[str]) -> None:
        """Put each payload of a channel into the queue. A full queue drops its oldest payload, so
        that a slow listener delays no other one; dropped payloads are counted.

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
        """Wait a few seconds for messages and handlers, then end all tasks.

        Events of `outbox` that are not sent by then stay there.
        """
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._publisher.drain()
        except TimeoutError:
            log.warning("what waited for Redis was not sent within %.0f s", DRAIN_TIMEOUT)
        await cancel(*self._running, patience=CANCEL_TIMEOUT)
        await self._handlers.close(drain=DRAIN_TIMEOUT, patience=CANCEL_TIMEOUT)
        self._publisher.stop()
        self.leases.close()
        if self._inbox is not None:
            await self._inbox.leave()
        await close_client(self._client)
        await close_client(self._blocking)

    @property
    def connected(self) -> bool:
        """Whether Redis is connected. A denied channel does not matter."""
        return self._subscriber.connected

    def status(self) -> dict[str, Any]:
        """The status for `/health`: the current connection, and counts since the bus was
        created."""
        return {
            "connected": self.connected,
            "url": self._url,
            "outages": self._subscriber.outages,
            "seconds_away": round(self._subscriber.seconds_away, 3),
            **self._publisher.status(),
            "handler_errors": self._handlers.errors,
            "refused": self._refused_messages + self._subscriber.too_long,
            "dropped": self._subscriber.dropped,
            "pauses": self._subscriber.pauses,
            "denied": self._denied.operations(),
            "warnings": list(self._warnings),
            "inbox": None if self._inbox is None else self._inbox.status(),
        }

    async def _subscribe(self, channel: str, handler: BatchHandler, most: int) -> None:
        if self._refused("subscribe"):
            return
        queue = PayloadQueue(HANDLER_QUEUE, HANDLER_CHARACTERS)
        self._handlers.add(channel, handler, queue, most)
        await self._subscriber.add(channel, queue)

    def _run(self, name: str, job: Coroutine[Any, Any, None]) -> None:
        self._running.append(start_detached(job, name=f"event-bus {name}"))

    async def _check_server(self) -> None:
        """Logs a warning, once, if Redis may lose acknowledged writes."""
        await self._subscriber.here.wait()
        self._warnings = await durability(self._client)

    def _refused(self, operation: str) -> bool:
        if self._closed:
            log.error("%s on an event bus that is closed", operation)
        return self._closed
