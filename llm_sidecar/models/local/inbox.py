"""The answers of a worker to one job."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.local.protocol import Answer, Died, Progress, is_final, joined


class Inbox:
    """A queue with one reader.

    It merges progress that waits for the reader: a slow reader takes no more memory than the
    completion itself, and the worker never waits for it.

    Attributes:
        on_end: called when the worker has ended the job, even if the reader has not read that yet.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self._answers: deque[Answer] = deque()
        self._arrived = asyncio.Event()

    def put_nowait(self, answer: Answer) -> None:
        """Adds an answer."""
        last = self._answers[-1] if self._answers else None
        if isinstance(last, Progress) and isinstance(answer, Progress):
            self._answers[-1] = joined(last, answer)
        else:
            self._answers.append(answer)
        self._arrived.set()
        if is_final(answer) and not isinstance(answer, Died):
            self.on_end()

    async def get(self) -> Answer:
        """Waits for the next answer, and removes it."""
        while not self._answers:
            self._arrived.clear()
            await self._arrived.wait()
        return self._answers.popleft()

    async def answers(self, deadline: Deadline) -> AsyncGenerator[Answer, None]:
        """All answers, up to the final one.

        At the deadline, it first yields what has arrived: the reader may have been slow.

        Raises:
            TimeoutError: the final answer has not arrived by the deadline.
        """
        answer: Answer | None = None
        try:
            while answer is None or not is_final(answer):
                async with deadline.timeout():
                    answer = await self.get()
                yield answer
        except TimeoutError:
            # Only once: a worker that is not cancelled yet adds more, after the deadline.
            arrived, self._answers = self._answers, deque()
            for answer in arrived:
                yield answer
            if answer is None or not is_final(answer):
                raise
