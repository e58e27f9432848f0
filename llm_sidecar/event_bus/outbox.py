"""Where events wait until Redis has them.

`MemoryOutbox` loses them when the process ends. The outbox of the journal does not.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice
from typing import NamedTuple, Protocol

from llm_sidecar.cloud_event import CloudEvent


class Queued(NamedTuple):
    """An event and its number. Numbers increase within an outbox, and may have gaps."""

    number: int
    event: CloudEvent


class Outbox(Protocol):
    """Events in commit order. Several processes may share an outbox.

    Attributes:
        id: identifies the outbox. It changes when the numbers start again.
        filled: set when events were added. The relay clears it before it reads.
    """

    id: str
    filled: asyncio.Event

    def sending(self) -> AbstractAsyncContextManager[bool]:
        """Makes this process the only sender; yields False, at once, if another process is
        sending."""
        ...

    async def head(self, count: int) -> Sequence[Queued]:
        """The oldest events, at most `count`."""
        ...

    async def sent(self, number: int) -> None:
        """Removes the events up to and including `number`."""
        ...


class MemoryOutbox:
    """An outbox of this process.

    Args:
        max_events, max_characters: bounds; beyond either, the oldest event is dropped.

    Attributes:
        dropped: the number of events that were dropped.
    """

    def __init__(self, max_events: int, max_characters: int) -> None:
        self.id = str(uuid.uuid4())
        self.filled = asyncio.Event()
        self.dropped = 0
        self._events: deque[Queued] = deque()
        self._number = 0
        self._characters = 0
        self._max_events = max_events
        self._max_characters = max_characters

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: CloudEvent) -> None:
        """Adds an event as the newest."""
        self._number += 1
        if len(event.data) > self._max_characters:
            # It would push out all other events, and then itself.
            self.dropped += 1
            return
        self._events.append(Queued(self._number, event))
        self._characters += len(event.data)
        while len(self._events) > self._max_events or self._characters > self._max_characters:
            self._drop_oldest()
            self.dropped += 1
        self.filled.set()

    def clear(self) -> int:
        """Drops all events, and returns their number."""
        count = len(self._events)
        self.dropped += count
        while self._events:
            self._drop_oldest()
        return count

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[bool]:
        """See `Outbox`."""
        yield True

    async def head(self, count: int) -> Sequence[Queued]:
        """See `Outbox`."""
        return list(islice(self._events, count))

    async def sent(self, number: int) -> None:
        """See `Outbox`."""
        while self._events and self._events[0].number <= number:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._characters -= len(self._events.popleft().event.data)
