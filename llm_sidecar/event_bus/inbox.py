"""Reads the inbox, which all sidecars share, and passes its entries to one handler.

An entry is acknowledged after the handler has stored it. If a sidecar dies, another one claims its
pending entries. An entry that is invalid, or has failed `MOST_DELIVERIES` times, becomes a dead
letter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from redis.exceptions import RedisError

from llm_sidecar.errors import SidecarError
from llm_sidecar.event_bus.consumer_group import ConsumerGroup, Entry
from llm_sidecar.event_bus.dead_letters import DEAD, DeadLetters
from llm_sidecar.event_bus.denied import TRY_AGAIN, Denied
from llm_sidecar.event_bus.redis_errors import is_denial, reason
from llm_sidecar.event_bus.subscriber import Subscriber

InboxHandler = Callable[[Sequence[Entry]], Awaitable[Sequence[str | None]]]
"""Stores entries. Returns for each entry None, or why it is invalid, without any text of it. A
SidecarError means that the database cannot store them now, and that they are tried again."""

GROUP: Final = "osiris.sidecars"
BATCH: Final = 500
"""Maximum number of entries that the handler gets at once."""
BLOCK: Final = 2.0
"""Seconds for which a read waits for a new entry."""
CLAIM_AFTER: Final = 60.0
"""Idle seconds after which a pending entry counts as abandoned."""
CLAIM_EVERY: Final = 5.0
"""Seconds between two searches for abandoned entries."""
MOST_DELIVERIES: Final = 5
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 5.0
LEAVE_TIMEOUT: Final = 1.0
"""Seconds that leaving the group may take."""

log = logging.getLogger(__name__)


class Inbox:
    """Reads the inbox as one consumer.

    Args:
        group: the inbox and its consumers.
        dead: gets entries that cannot be stored.
        handler: stores entries.
        subscriber: reports whether Redis is connected.
        denied: what Redis denies.
    """

    def __init__(
        self,
        group: ConsumerGroup,
        dead: DeadLetters,
        handler: InboxHandler,
        subscriber: Subscriber,
        denied: Denied,
    ) -> None:
        self._group = group
        self._dead = dead
        self._handler = handler
        self._subscriber = subscriber
        self._denied = denied
        self._next_claim = 0.0
        self._delay = FIRST_DELAY
        self._counts = dict.fromkeys(("pending", "dead", "handled", "claimed", "failures"), 0)

    def status(self) -> dict[str, int]:
        """Counts for `/health`. `pending` (of the group) and `dead` are as of the last search for
        abandoned entries; `handled`, `claimed` and `failures` (of the handler) count from the
        start."""
        return dict(self._counts)

    async def run(self) -> None:
        """Handles entries as they come, until cancelled."""
        operation = f"XREADGROUP {self._group.stream}"
        while True:
            await self._subscriber.here.wait()
            try:
                await self._claim_what_is_left()
                if entries := await self._group.read(BATCH, BLOCK):
                    await self._handle(entries)
                self._denied.remove(operation)
                self._delay = FIRST_DELAY
            except Exception as error:  # noqa: BLE001 - entries have to be read after any error
                if is_denial(error):
                    self._denied.add(operation)
                    await asyncio.sleep(TRY_AGAIN)
                else:
                    await self._wait_after(error)

    async def leave(self) -> None:
        """Removes this consumer from the group, unless Redis is away or it has pending entries,
        which another one claims."""
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT):
                await self._group.leave()
        except (RedisError, TimeoutError) as error:
            log.debug("the consumer of the inbox stays: %s", reason(error))

    async def _wait_after(self, error: Exception) -> None:
        if self._delay == FIRST_DELAY:
            log.warning("the inbox cannot be read, trying again: %s", reason(error))
        self._subscriber.check()
        await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    async def _claim_what_is_left(self) -> None:
        if time.monotonic() < self._next_claim:
            return
        while entry := await self._group.claim(CLAIM_AFTER):
            self._counts["claimed"] += 1
            log.warning("claimed the abandoned entry %s of the inbox", entry.id)
            if entry.deliveries > MOST_DELIVERIES:
                await self._bury(entry, f"its consumer died {MOST_DELIVERIES} times")
            else:
                await self._handle([entry])
        self._counts["pending"] = await self._group.pending()
        with self._dead_letters():
            self._counts["dead"] = await self._dead.count()
        self._next_claim = time.monotonic() + CLAIM_EVERY

    async def _handle(self, entries: Sequence[Entry]) -> None:
        """Passes entries to the handler until each is stored or is a dead letter."""
        try:
            reasons = await self._store(entries)
        except Exception as error:  # noqa: BLE001 - whatever the handler raises concerns an entry
            await self._failed(entries, error)
            return
        results = list(zip(entries, reasons, strict=True))
        stored = [entry.id for entry, why in results if why is None]
        await self._group.done(*stored)
        self._counts["handled"] += len(stored)
        for entry, why in results:
            if why is not None:
                await self._bury(entry, why)

    async def _store(self, entries: Sequence[Entry]) -> Sequence[str | None]:
        """Calls the handler, and retries while the database cannot store anything."""
        delay = FIRST_DELAY
        while True:
            try:
                reasons = await self._handler(entries)
                if len(reasons) != len(entries):
                    raise ValueError("the handler must return one result per entry")
                return reasons
            except SidecarError as error:
                if delay == FIRST_DELAY:
                    log.error("entries of the inbox wait: %s", error.detail)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY)
            try:
                await self._group.hold([entry.id for entry in entries])
            except RedisError as error:
                log.debug("the claim on entries of the inbox is not renewed: %s", reason(error))

    async def _failed(self, entries: Sequence[Entry], error: Exception) -> None:
        """Handles entries one by one, because one of them has made the handler fail."""
        self._counts["failures"] += 1
        name = type(error).__name__
        if len(entries) > 1:
            log.error("the handler of the inbox failed (%s): one entry at a time", name)
            for entry in entries:
                await self._handle([entry])
        elif entries[0].deliveries >= MOST_DELIVERIES:
            await self._bury(entries[0], f"handling it failed {MOST_DELIVERIES} times: {name}")
        else:
            log.error("the handler of the inbox failed: %s", name)
            await asyncio.sleep(FIRST_DELAY * 2 ** entries[0].deliveries)
            await self._handle([await self._group.again(entries[0])])

    async def _bury(self, entry: Entry, why: str) -> None:
        with self._dead_letters():
            await self._dead.add(self._group, entry, why)
            log.error("entry %s of the inbox is a dead letter: %s", entry.id, why)
            self._counts["dead"] += 1

    @contextlib.contextmanager
    def _dead_letters(self) -> Iterator[None]:
        """Goes on without the dead letters if Redis denies them: what should become one stays
        pending, and is claimed again."""
        operation = f"XADD {DEAD}"
        try:
            yield
        except RedisError as error:
            if not is_denial(error):
                raise
            self._denied.add(operation)
        else:
            self._denied.remove(operation)
