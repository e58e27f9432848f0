"""The sending half of the bus: in the order of the calls, and what an outage held back afterwards.

Whether Redis took a message whose answer never came cannot be known. Such a message is sent again,
so a subscriber may get it twice; the payloads carry ids by which it can tell.
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
"""What waits for Redis to come back, at most; beyond it the oldest is dropped."""
LIVE_ONLY: Final = ("audio.bytes", "tts.")
"""How channels begin whose messages mean nothing later: speech, and what is said about it."""

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    channel: str
    payload: str


class Publisher:
    """Publishes while Redis is there, and keeps a bounded number of messages while it is not.

    Args:
        client: must raise on errors, not retry.
        subscriber: knows whether Redis is there.

    Attributes:
        published: messages that Redis has confirmed, late ones included.
        late: those of them that waited for Redis.
        lost: messages that are never sent: dropped from a full outbox, live ones of an outage,
            refused by Redis, left at the close.
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
        """Sends what waits and then this, and says whether Redis took it; never raises for Redis.

        False leaves it waiting, unless the channel is one of `LIVE_ONLY` or Redis refused it.
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
            # Without Redis nothing above waits, and a caller's loop would keep the bus from
            # connecting.
            await asyncio.sleep(0)
        return sent

    async def run(self) -> None:
        """Sends what waits whenever Redis is back, until cancelled."""
        while True:
            await self._filled.wait()
            await self._subscriber.here.wait()
            async with self._sending:
                try:
                    await self._flush()
                except RedisError as error:
                    log.debug("messages wait on: %s", error)

    async def drain(self) -> None:
        """Returns when nothing waits any more; the caller sets the bound."""
        while self._outbox and self._subscriber.connected:
            async with self._sending:
                try:
                    await self._flush()
                except RedisError as error:
                    log.debug("messages wait on: %s", error)

    def refuse(self, channel: str, error: RedisError) -> None:
        """Counts and logs a message that is not even tried."""
        log.error("not published to %s: %s", channel, error)
        self.lost += 1

    async def stop(self) -> None:
        """Waits for the message under way, then counts what nobody will send as lost."""
        async with self._sending:
            if self._outbox:
                log.error("%d messages were never published", len(self._outbox))
            self.lost += len(self._outbox)
            self._outbox.clear()

    async def _flush(self) -> None:
        """Sends what waits, oldest first; what raises stays first, unless Redis refuses it."""
        while self._outbox:
            channel, payload = self._outbox[0]
            try:
                await self._send(channel, payload)
                self.late += 1
            except (RedisConnectionError, RedisTimeoutError):
                raise
            except RedisError as error:
                # Without the id of the request that happens to publish now.
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
