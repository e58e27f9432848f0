"""Who may go next: requests in their order, and what has to be alone before all that wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator


class Turns:
    """A semaphore, first come, first served, that grows and can be had as a whole.

    async with turns: ...            # with as many others as there is room for
    async with turns.alone(): ...    # when those have gone, and before any that waits
    """

    def __init__(self) -> None:
        """Has room for one."""
        self._room = 1
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_held = False
        self._emptied: asyncio.Future[None] | None = None

    def widen(self, room: int) -> None:
        """Has room for so many from now on; never for fewer than before."""
        self._room = max(self._room, room)
        self._call()

    async def __aenter__(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._call()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It was this one's turn just now; the others are passed over.
                self._leave()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._leave()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Lets those end that have begun, and nobody begin meanwhile; one at a time."""
        self._is_held = True
        try:
            if self._taken:
                self._emptied = asyncio.get_running_loop().create_future()
                await self._emptied
            yield
        finally:
            self._is_held = False
            self._emptied = None
            self._call()

    def _leave(self) -> None:
        self._taken -= 1
        self._call()

    def _call(self) -> None:
        if not self._taken and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)
        while self._waiting and self._taken < self._room and not self._is_held:
            turn = self._waiting.popleft()
            if not turn.done():
                self._taken += 1
                turn.set_result(None)
