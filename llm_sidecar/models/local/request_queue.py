"""A FIFO queue of requests that limits how many are admitted and how many run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import QueueFull


class RequestQueue:
    """The FIFO queue of one model.

    Attributes:
        length: the maximum of `admitted`.
        admitted: requests that wait or run now.
        running: requests that the worker has now.
        idle: set while no request is admitted.
    """

    def __init__(self, name: str, length: int) -> None:
        self.length = length
        self.admitted = 0
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._name = name
        self._capacity = 1
        self._turns = asyncio.Semaphore(1)
        self._recent_seconds = 1.0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Counts a request while the context lasts.

        Raises:
            QueueFull: `length` requests are admitted already.
        """
        if self.admitted >= self.length:
            wait = self.retry_after()
            raise QueueFull(
                f"The {self._name} queue is full; try again in {wait} s.", retry_after=wait
            )
        self.admitted += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.admitted -= 1
            if not self.admitted:
                self.idle.set()

    @contextlib.asynccontextmanager
    async def turn(self, deadline: Deadline) -> AsyncIterator[contextlib.ExitStack]:
        """Waits until fewer requests run than the worker's capacity.

        Yields:
            the turn; close it to end the turn before the context ends.

        Raises:
            TimeoutError: the deadline passes first.
        """
        async with deadline.timeout():
            await self._turns.acquire()
        began, ended = time.monotonic(), list[float]()
        with contextlib.ExitStack() as turn:
            turn.callback(lambda: ended.append(time.monotonic()))
            turn.callback(self._turns.release)
            yield turn
        self._recent_seconds += 0.2 * (ended[0] - began - self._recent_seconds)

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Counts a request as running while the context lasts."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def busy(self) -> bool:
        """Whether a new request has to wait for its turn."""
        return self.running >= self._capacity

    def grow(self, capacity: int) -> None:
        """Raises the number of requests that may run at the same time to at least this one."""
        while self._capacity < capacity:
            self._capacity += 1
            self._turns.release()

    def retry_after(self) -> int:
        """Estimated seconds until the requests that run and wait now are answered."""
        return max(1, round(self.admitted / self._capacity * self._recent_seconds))
