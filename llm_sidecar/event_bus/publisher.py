"""The sending half of the bus: it keeps the order of the calls, even through an outage of Redis.

If Redis does not answer, it is unknown whether it has the message. The message is sent again, so a
subscriber may get it twice; it can recognise the second one by the id in the payload.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from typing import Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar.event_bus.subscriber import Subscriber

OUTBOX_MESSAGES: Final = 10_000
OUTBOX_CHARACTERS: Final = 16 << 20
"""Maximum number of messages that wait for Redis, and of their characters in total; beyond either,
the oldest message is dropped."""
LIVE_ONLY: Final = ("audio.bytes", "tts.")
"""Prefixes of the channels whose messages are useless later: speech, and the messages of its
workers."""

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    channel: str
    payload: str


class Publisher:
    """Publishes while Redis is connected, and keeps a bounded number of messages while it is not.

    Args:
        client: must raise on errors, not retry.
        subscriber: reports whether Redis is connected.

    Attributes:
        published: number of messages that Redis has confirmed.
        late: how many of them waited for Redis.
        lost: number of messages that were never sent: dropped from a full outbox, live-only ones
            during an outage, refused by Redis, or still waiting at the close.
    """

    def __init__(self, client: Redis, subscriber: Subscriber) -> None:
        self.published = 0
        self.late = 0
        self.lost = 0
        self._client = client
        self._subscriber = subscriber
        self._sending = asyncio.Lock()
        self._outbox: deque[_Waiting] = deque()
        self._characters = 0
        self._filled = asyncio.Event()
        self._quiet = False

    @property
    def waiting(self) -> int:
        """Messages that wait for Redis."""
        return len(self._outbox)

    async def publish(self, channel: str, payload: str) -> bool:
        """Sends the waiting messages, then this one; returns whether Redis accepted it.

        An error of Redis is not raised: the message waits, unless its channel is one of
        `LIVE_ONLY` or Redis refused the message.
        """
        sent = False
        async with self._sending:
            try:
                await self._flush()
                await self._send(channel, payload)
                sent, self._quiet = True, False
            except (RedisConnectionError, RedisTimeoutError) as error:
                self._tell(channel, error)
                if channel.startswith(LIVE_ONLY):
                    self.lost += 1
                else:
                    self._keep(_Waiting(channel, payload))
            except RedisError as error:
                self._tell(channel, error)
                self.lost += 1
        if not sent:
            # Without Redis nothing above awaits, so a looping caller would block the connection
            # attempts.
            await asyncio.sleep(0)
        return sent

    async def run(self) -> None:
        """Sends the waiting messages whenever Redis is back, until cancelled."""
        while True:
            await self._filled.wait()
            await self._subscriber.here.wait()
            async with self._sending:
                try:
                    await self._flush()
                except RedisError as error:
                    log.debug("messages wait on: %s", error)

    async def drain(self) -> None:
        """Returns when no message waits; the caller sets a time limit."""
        while self._outbox and self._subscriber.connected:
            async with self._sending:
                try:
                    await self._flush()
                except RedisError as error:
                    log.debug("messages wait on: %s", error)

    def refuse(self, channel: str, error: RedisError) -> None:
        """Counts and logs a message that is not sent."""
        log.error("not published to %s: %s", channel, error)
        self.lost += 1

    async def stop(self) -> None:
        """Waits for the message that is being sent, then counts all that still wait as lost."""
        async with self._sending:
            if self._outbox:
                log.error("%d messages were never published", len(self._outbox))
            self.lost += len(self._outbox)
            self._outbox.clear()

    async def _flush(self) -> None:
        """Sends the waiting messages, oldest first. After an error the message stays first, unless
        Redis refused it."""
        while self._outbox:
            channel, payload = self._outbox[0]
            try:
                await self._send(channel, payload)
                self.late += 1
            except (RedisConnectionError, RedisTimeoutError):
                raise
            except RedisError as error:
                # The log line gets no request id: the message belongs to another request.
                contextvars.Context().run(self._tell, channel, error)
                self.lost += 1
            self._drop_oldest()
        self._filled.clear()

    async def _send(self, channel: str, payload: str) -> None:
        if not self._subscriber.connected:
            raise RedisConnectionError("not connected")
        try:
            await self._client.publish(channel, payload)
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._subscriber.restart(error)
            raise
        self.published += 1

    def _keep(self, message: _Waiting) -> None:
        self._outbox.append(message)
        self._characters += len(message.payload)
        while len(self._outbox) > OUTBOX_MESSAGES or self._characters > OUTBOX_CHARACTERS:
            self._drop_oldest()
            self.lost += 1
        if self._outbox:
            self._filled.set()

    def _drop_oldest(self) -> None:
        self._characters -= len(self._outbox.popleft().payload)

    def _tell(self, channel: str, error: RedisError) -> None:
        if not self._quiet:
            # Redis quotes the arguments of an unknown command in its error.
            reason = str(error).partition(", with args")[0]
            log.error("not published to %s, more are only counted: %s", channel, reason)
        self._quiet = True
