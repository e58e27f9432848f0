"""Listeners of the WAVs that are published on `audio.bytes`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from llm_sidecar.errors import QueueFull
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts.voice import AUDIO_BYTES

BACKLOG: Final = 16
"""WAVs that wait for one listener at most; each is up to a few megabytes."""
_RETRY_AFTER: Final = 5


class Backlog(asyncio.Queue[str]):
    """WAVs that wait for one listener; if there are `BACKLOG`, a new one replaces the oldest."""

    def __init__(self, listeners: AudioListeners) -> None:
        super().__init__()
        self._listeners = listeners
        self._lost = 0

    def put_nowait(self, item: str) -> None:
        """Adds a WAV; drops the oldest one if the backlog is full."""
        if self.qsize() >= BACKLOG:
            self.get_nowait()
            self.task_done()
            self._lost += 1
            self._listeners.lost += 1
        super().put_nowait(item)

    def take_lost(self) -> int:
        """The number of WAVs dropped since the last call."""
        lost, self._lost = self._lost, 0
        return lost


class AudioListeners:
    """Registers listeners on the event bus, up to a limit.

    Attributes:
        count: how many listen now.
        lost: WAVs dropped in total because listeners were slow.
    """

    def __init__(self, bus: EventBus, limit: int) -> None:
        self._bus = bus
        self._limit = limit
        self.count = 0
        self.lost = 0

    def check_capacity(self) -> None:
        """Raises QueueFull if no further listener may join."""
        if self.count >= self._limit:
            raise QueueFull(
                f"{self._limit} listeners are connected, which is MAX_AUDIO_LISTENERS; try later.",
                retry_after=_RETRY_AFTER,
            )

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[Backlog]:
        """Every WAV that is published while the context lasts.

        Raises:
            QueueFull: there are too many listeners.
        """
        self.check_capacity()
        backlog = Backlog(self)
        self.count += 1
        try:
            await self._bus.register_listener_queue(AUDIO_BYTES, backlog)
            yield backlog
        finally:
            self.count -= 1
            await self._bus.unregister_listener_queue(AUDIO_BYTES, backlog)
