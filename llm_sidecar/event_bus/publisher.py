"""The sending side of the bus: events go through outboxes, live messages directly.

Only the tasks of `jobs` wait for Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from redis.asyncio import Redis

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.live import LIVE_ONLY, LivePublisher
from llm_sidecar.event_bus.outbox import MemoryOutbox, Outbox
from llm_sidecar.event_bus.relay import Relay
from llm_sidecar.event_bus.subscriber import Subscriber

SOURCE: Final = "/osiris/llm-sidecar"
"""The source of this service's events."""
SCHEMAS: Final = "docs/asyncapi.yaml"
"""The document with the schemas of their payloads."""
OUTBOX_MESSAGES: Final = 10_000
OUTBOX_CHARACTERS: Final = 16 << 20
"""Maximum number of published events that wait for Redis, and of their characters in total; beyond
either, the oldest event is dropped."""
_POLL: Final = 0.01

log = logging.getLogger(__name__)


class Publisher:
    """Sends published messages, and the events of a durable outbox.

    Args:
        client: must raise on errors, not retry.
        subscriber: reports whether Redis is connected.
        denied: what Redis denies.
        stream: the name of the stream of events.
        maxlen: about how many entries the stream keeps.
        outbox: the durable outbox.
    """

    def __init__(
        self,
        client: Redis,
        subscriber: Subscriber,
        denied: Denied,
        *,
        stream: str,
        maxlen: int,
        outbox: Outbox | None,
    ) -> None:
        self._subscriber = subscriber
        self._live = LivePublisher(client, subscriber, denied)
        self._outbox = MemoryOutbox(OUTBOX_MESSAGES, OUTBOX_CHARACTERS)
        self._refused = 0
        self._relays = [
            Relay(client, each, subscriber, denied, stream=stream, maxlen=maxlen)
            for each in (self._outbox, outbox)
            if each is not None
        ]

    def publish(self, event_type: str, payload: str) -> bool:
        """Accepts a message; returns True if Redis is connected, so that it is sent now."""
        if event_type in LIVE_ONLY:
            return self._live.publish(event_type, payload)
        self.send(CloudEvent(type=event_type, data=payload, source=SOURCE, dataschema=SCHEMAS))
        return self._subscriber.connected

    def send(self, event: CloudEvent) -> None:
        """Adds an event to the outbox in memory."""
        self._outbox.add(event)

    def refuse(self, event_type: str, reason: str) -> None:
        """Counts and logs a message that is not sent."""
        log.error("not published to %s: %s", event_type, reason)
        self._refused += 1

    def jobs(self) -> Mapping[str, Coroutine[Any, Any, None]]:
        """The work that sends, to be run as tasks until they are cancelled."""
        relays = {f"relay {number}": each.run() for number, each in enumerate(self._relays)}
        return {"live publisher": self._live.run(), **relays}

    async def drain(self) -> None:
        """Returns when nothing waits, or Redis is away; the caller sets a time limit.

        Events of the durable outbox that Redis does not accept stay there.
        """
        while self._subscriber.connected and self._busy():  # noqa: ASYNC110 - only at the close
            await asyncio.sleep(_POLL)

    def _busy(self) -> bool:
        sending = any(not relay.idle and relay.failing is None for relay in self._relays)
        return sending or len(self._outbox) > 0 or not self._live.idle

    def stop(self) -> None:
        """Counts all waiting messages as lost. Call it after the jobs have ended."""
        if (count := self._outbox.clear()) > 0:
            log.error("%d messages were never published", count)

    def status(self) -> dict[str, Any]:
        """Counts for `/health`."""
        relays = self._relays
        lost = self._refused + self._live.lost + self._outbox.dropped
        return {
            "published": self._live.published + sum(relay.sent for relay in relays),
            "published_late": sum(relay.late for relay in relays),
            "waiting": len(self._outbox),
            "unpublished": lost + sum(relay.lost for relay in relays),
            "oldest_seconds": round(max(relay.oldest_seconds for relay in relays), 3),
            "failing": next((relay.failing for relay in relays if relay.failing), None),
        }
