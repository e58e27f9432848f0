"""Those who listen to what goes out on `audio.bytes`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from llm_sidecar.errors import QueueFull
from llm_sidecar.event_bus import EventBus
from llm_sidecar.tts.voice import AUDIO_BYTES

BACKLOG: Final = 16
"""WAVs that wait for one listener before its oldest is dropped; each is up to a few megabytes."""
_RETRY_AFTER: Final = 5


class Backlog(asyncio.Queue[str]):
    """What waits for one listener: at most `BACKLOG` WAVs, of which a new one drops the oldest."""

    def __init__(self, listeners: AudioListeners) -> None:
        super().__init__()
        self._listeners = listeners
        self._lost = 0

    def put_nowait(self, item: str) -> None:
        """Never full: the listener is told later what it lost."""
        if self.qsize() >= BACKLOG:
            self.get_nowait()
            self.task_done()
            self._lost += 1
            self._listeners.lost += 1
        super().put_nowait(item)

    def take_lost(self) -> int:
        """How many were dropped since the last call."""
        lost, self._lost = self._lost, 0
        return lost


class AudioListeners:
    """Registers listeners on the event bus, up to a limit.

    Attributes:
        count: how many listen now.
        lost: WAVs that slow listeners lost, all of them together.
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
        """Every WAV that goes out while the block lasts.

        Raises:
            QueueFull: as many listen as may.
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
