"""Where events wait until Redis has them.

`MemoryOutbox` loses them when the process ends. The journal of the database implements `Outbox`
too, and does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol

from llm_sidecar.cloud_event import CloudEvent


class Queued(NamedTuple):
    """An event with its place in the order of its outbox, which starts at 1 and has gaps."""

    number: int
    event: CloudEvent


class Outbox(Protocol):
    """Events in the order in which they were committed; several processes may share it.

    Attributes:
        id: identifies the outbox, and stays the same as long as its numbers go on.
        filled: set when events were added. The relay clears it before it reads.
    """

    id: str
    filled: asyncio.Event

    def sending(self) -> AbstractAsyncContextManager[bool]:
        """Held by the only process that sends now; False, at once, if another one is sending."""
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
        id: see `Outbox`.
        max_events, max_characters: bounds; beyond either, the oldest event is dropped.

    Attributes:
        dropped: the number of events that were dropped.
    """

    def __init__(self, id: str, max_events: int, max_characters: int) -> None:
        self.id = id
        self.filled = asyncio.Event()
        self.dropped = 0
        self._events: list[Queued] = []
        self._number = 0
        self._characters = 0
        self._max_events = max_events
        self._max_characters = max_characters

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: CloudEvent) -> None:
        """Adds an event as the newest."""
        self._number += 1
        self._events.append(Queued(self._number, event))
        self._characters += len(event.data)
        while len(self._events) > self._max_events or self._characters > self._max_characters:
            self._characters -= len(self._events.pop(0).event.data)
            self.dropped += 1
        self.filled.set()

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[bool]:
        """See `Outbox`."""
        yield True

    async def head(self, count: int) -> Sequence[Queued]:
        """See `Outbox`."""
        return self._events[:count]

    async def sent(self, number: int) -> None:
        """See `Outbox`."""
        while self._events and self._events[0].number <= number:
            self._characters -= len(self._events.pop(0).event.data)
