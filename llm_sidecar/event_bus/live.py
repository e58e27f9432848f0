"""Publishes live-only messages: at once or never, because they are useless later.

A slow Redis delays no caller: all waiting messages are sent in the next round trip.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.redis_errors import is_denial, reason
from llm_sidecar.event_bus.subscriber import Subscriber

LIVE_ONLY: Final = frozenset(("audio.bytes",))
"""The channels whose messages are live-only."""
LIVE_MESSAGES: Final = 1_000
LIVE_CHARACTERS: Final = 32 << 20
"""Maximum number of messages that wait for the current round trip, and of their characters in
total; beyond either, the oldest message is dropped."""

log = logging.getLogger(__name__)


class _Message(NamedTuple):
    channel: str
    payload: str


class LivePublisher:
    """Publishes to live-only channels, in the order of the calls.

    Args:
        client: must raise on errors, not retry.
        subscriber: reports whether Redis is connected.
        denied: what Redis denies.

    Attributes:
        published: messages that Redis has confirmed.
        lost: messages that were not sent, because Redis was away or denied them, or too many
            waited.
    """

    def __init__(self, client: Redis, subscriber: Subscriber, denied: Denied) -> None:
        self.published = 0
        self.lost = 0
        self._client = client
        self._subscriber = subscriber
        self._denied = denied
        self._waiting: deque[_Message] = deque()
        self._characters = 0
        self._filled = asyncio.Event()
        self._sending = False

    def publish(self, channel: str, payload: str) -> bool:
        """Queues a message to be sent; returns False if it is lost."""
        permitted = self._denied.permits(f"PUBLISH {channel}")
        if not (permitted and self._subscriber.connected) or len(payload) > LIVE_CHARACTERS:
            self.lost += 1
            return False
        self._waiting.append(_Message(channel, payload))
        self._characters += len(payload)
        while len(self._waiting) > LIVE_MESSAGES or self._characters > LIVE_CHARACTERS:
            self._take()
            self.lost += 1
        self._filled.set()
        return True

    @property
    def idle(self) -> bool:
        """Whether no message waits or is being sent."""
        return not (self._waiting or self._sending)

    async def run(self) -> None:
        """Sends the queued messages, until cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._waiting:
                self._sending = True
                await self._send([self._take() for _ in range(len(self._waiting))])
                self._sending = False

    def _take(self) -> _Message:
        message = self._waiting.popleft()
        self._characters -= len(message.payload)
        return message

    async def _send(self, messages: list[_Message]) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for message in messages:
                    pipe.publish(*message)
                results = await pipe.execute(raise_on_error=False)
        except RedisError as error:
            log.debug("%d live messages are lost: %s", len(messages), reason(error))
            self.lost += len(messages)
            self._subscriber.check()
            return
        for message, result in zip(messages, results, strict=True):
            if not isinstance(result, Exception):
                self.published += 1
                self._denied.remove(f"PUBLISH {message.channel}")
                continue
            self.lost += 1
            if is_denial(result):
                self._denied.add(f"PUBLISH {message.channel}")
