"""Sends the events of an outbox to Redis: each once into a stream, and to the channel of its type.

Each batch is one transaction (MULTI). It also sets a key, the record, to the id of its last event,
and watches that key. After an unknown outcome, or when another process becomes the sender, the
record says which events Redis already has. A transaction that arrives after a newer one is aborted
by its own WATCH (https://redis.io/docs/latest/develop/using-commands/transactions/).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import random
import re
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_sidecar import timestamps
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.outbox import Outbox, Queued
from llm_sidecar.event_bus.redis_errors import is_answer, is_denial, reason
from llm_sidecar.event_bus.subscriber import Subscriber

MOST_EVENTS: Final = 256
"""Maximum number of events in one transaction. After a failure, it starts at 1 and doubles."""
MOST_CHARACTERS: Final = 32 << 10
"""Maximum number of characters in one transaction, so that a slow connection carries them within
the reply timeout. A longer event is sent alone."""
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 5.0
LOOK_AGAIN: Final = 1.0
"""Seconds between two attempts to become the sender while another process is the sender."""
KEPT_SECONDS: Final = 8 * 24 * 3600
"""Seconds for which Redis keeps the record: longer than any outbox keeps an event."""

_COMMAND: Final = re.compile(r"Command # (\d+) \(")

log = logging.getLogger(__name__)


class Relay:
    """Sends the events of one outbox in order, and retries each until Redis has it.

    If Redis denies the stream, events go only to their channels; if it denies a channel, its events
    go only to the stream.

    Args:
        client: must raise on errors, not retry.
        outbox: the events; several processes may share it.
        subscriber: reports whether Redis is connected.
        denied: what Redis denies.
        stream: the name of the stream.
        maxlen: about how many entries the stream keeps.

    Attributes:
        sent: events that Redis has.
        late: how many of them had to wait for Redis.
        lost: events that were not sent, because both the stream and their channel are denied.
        failing: why the last attempt to send has failed, or None.
    """

    def __init__(
        self,
        client: Redis,
        outbox: Outbox,
        subscriber: Subscriber,
        denied: Denied,
        *,
        stream: str,
        maxlen: int,
    ) -> None:
        self.sent = 0
        self.late = 0
        self.lost = 0
        self.failing: str | None = None
        self._client = client
        self._outbox = outbox
        self._subscriber = subscriber
        self._denied = denied
        self._stream = stream
        self._maxlen = maxlen
        self._most = 1
        self._delay = FIRST_DELAY
        self._idle = True
        self._behind = False
        self._told = False
        self._oldest: str | None = None
        # A record that is not valid, because its transaction failed.
        self._void: str | None = None

    @property
    def oldest_seconds(self) -> float:
        """The age of the oldest event that waits, as of the last look; 0 if none waits."""
        if self._oldest is None:
            return 0.0
        age = timestamps.now() - datetime.datetime.fromisoformat(self._oldest)
        return max(0.0, age.total_seconds())

    @property
    def idle(self) -> bool:
        """Whether no event waits, or another process is the sender."""
        return self._idle and not self._outbox.filled.is_set()

    async def run(self) -> None:
        """Sends events as they come, until cancelled."""
        while True:
            await self._outbox.filled.wait()
            self._idle = False
            try:
                await self._connected()
                self._outbox.filled.clear()
                await self._drain()
            except Exception as error:  # noqa: BLE001 - the events have to go out after any error
                self._outbox.filled.set()
                self._failed(error)
                await self._pause()

    async def _connected(self) -> None:
        """Returns when Redis is connected."""
        if not self._subscriber.connected:
            self._behind = True
            if head := await self._outbox.head(1):
                self._oldest = head[0].event.time
            await self._subscriber.here.wait()

    async def _drain(self) -> None:
        """Sends until the outbox is empty, unless another process sends."""
        async with self._outbox.sending() as mine:
            while mine and (head := await self._outbox.head(MOST_EVENTS)):
                self._oldest = head[0].event.time
                if (count := await self._send(head)) > 0:
                    await self._outbox.sent(head[count - 1].number)
                    self._succeeded(count)
        self._idle = True
        if mine:
            self._behind, self._oldest = False, None
        else:
            await asyncio.sleep(LOOK_AGAIN)
            self._outbox.filled.set()

    def _succeeded(self, count: int) -> None:
        if self._told:
            log.info("Redis takes events again")
        self.failing, self._told, self._delay = None, False, FIRST_DELAY
        self._most = min(2 * self._most, MOST_EVENTS)
        self.sent += count
        self.late += count if self._behind else 0

    def _failed(self, error: Exception) -> None:
        self._behind, self._most = True, 1
        outage = isinstance(error, RedisConnectionError | RedisTimeoutError)
        if outage:
            self._subscriber.check()
        # The subscriber has a connection of its own. If that fails too, it logs the outage.
        lasts = self.failing is not None and self._subscriber.connected
        if not self._told and (lasts or not outage):
            log.error("events wait, trying again until Redis takes them: %s", reason(error))
            self._told = True
        self.failing = reason(error)

    async def _pause(self) -> None:
        """Waits before the next attempt; returns early when Redis connects or disconnects."""
        change = self._subscriber.away if self._subscriber.connected else self._subscriber.here
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay * random.uniform(0.5, 1.0)):
                await change.wait()
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    async def _send(self, head: Sequence[Queued]) -> int:
        """Sends the first events; returns how many of them Redis has now.

        Raises:
            RedisError: Redis has taken none of them, or its answer is unknown.
        """
        if self._most == 1:
            await self._require_transactions()
        async with self._client.pipeline(transaction=True) as pipe:
            if (count := await self._watch(pipe, head)) > 0:
                return count
            batch = self._batch(head)
            operations = self._fill(pipe, batch)
            try:
                results = await pipe.execute(raise_on_error=False)
            except NoPermissionError as error:
                self._denied.add(_refused(error, operations))
                return 0
            except WatchError:
                return 0  # a late transaction has set the record: read it again
            except RedisError as error:
                # Without MULTI, Redis has carried out the commands one by one, the record last.
                if is_answer(error) and not _lacks_multi(error):
                    self._void = batch[-1].event.id
                raise
        return await self._check(batch, operations, results)

    async def _require_transactions(self) -> None:
        """Raises RedisError if Redis denies MULTI: it would carry out the commands one by one, so
        that every attempt would add the event again."""
        try:
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.ping()
                await pipe.execute()
        except NoPermissionError as error:
            if "'ping'" not in str(error):
                raise ResponseError("it denies MULTI or EXEC") from None
        except ResponseError as error:
            if _lacks_multi(error):
                raise ResponseError("it denies MULTI or EXEC") from None
            raise

    async def _watch(self, pipe: Pipeline, head: Sequence[Queued]) -> int:
        """Watches the record; returns how many of these events Redis already has."""
        if not self._denied.permits(self._record_operation):
            return 0
        try:
            await pipe.watch(self._record)
            last = await pipe.get(self._record)
        except NoPermissionError:
            self._denied.add(self._record_operation)
            # It may be WATCH that is denied, and MULTI with it.
            await self._require_transactions()
            return 0
        except ResponseError as error:
            if not is_denial(error):
                raise
            return 0  # the key holds something else than text: no record, and SET replaces it
        if last is not None and last != self._void:
            for count, queued in enumerate(head, 1):
                if queued.event.id == last:
                    return count
        return 0

    def _batch(self, head: Sequence[Queued]) -> Sequence[Queued]:
        count, characters = 0, 0
        for queued in head[: self._most]:
            characters += len(queued.event.data)
            if count > 0 and characters > MOST_CHARACTERS:
                break
            count += 1
        return head[:count]

    def _fill(self, pipe: Pipeline, batch: Sequence[Queued]) -> list[tuple[int, str]]:
        """Adds the commands to the transaction; returns the index of the event and the operation of
        each command."""
        pipe.multi()  # type: ignore[no-untyped-call]
        operations: list[tuple[int, str]] = []
        for index, (_, event) in enumerate(batch):
            if self._denied.permits(operation := f"XADD {self._stream}"):
                fields: dict[Any, Any] = event.fields()
                pipe.xadd(self._stream, fields, maxlen=self._maxlen, approximate=True)
                operations.append((index, operation))
            if self._denied.permits(operation := f"PUBLISH {event.type}"):
                pipe.publish(event.type, event.data)
                operations.append((index, operation))
        if self._denied.permits(self._record_operation):
            pipe.set(self._record, batch[-1].event.id, ex=KEPT_SECONDS)
            operations.append((len(batch), self._record_operation))
        return operations

    async def _check(
        self, batch: Sequence[Queued], operations: list[tuple[int, str]], results: list[Any]
    ) -> int:
        """Returns how many events of a transaction Redis has; raises its error if it has none."""
        sent = set()
        for (index, operation), result in zip(operations, results, strict=True):
            if is_denial(result):
                self._denied.add(operation)
            elif isinstance(result, RedisError):
                # The record says that Redis has the whole batch, which is not true.
                self._void = batch[-1].event.id
                if index == 0:
                    raise result
                return index
            else:
                self._denied.remove(operation)
                sent.add(index)
        self.lost += len(set(range(len(batch))) - sent)
        self._void = None
        return len(batch)

    @property
    def _record(self) -> str:
        return f"{self._stream}.relay:{self._outbox.id}"

    @property
    def _record_operation(self) -> str:
        return f"SET {self._stream}.relay:*"


def _lacks_multi(error: RedisError) -> bool:
    return str(error).startswith("EXEC without MULTI")


def _refused(error: NoPermissionError, operations: list[tuple[int, str]]) -> str:
    """The operation that the error of a transaction is about; redis-py numbers them from 1."""
    found = _COMMAND.match(str(error))
    if found is None:
        raise error
    return operations[int(found[1]) - 1][1]
