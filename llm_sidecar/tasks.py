"""Tasks that outlive the request that starts them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from llm_sidecar.logs import start_owned

T = TypeVar("T")


class TaskSet:
    """Work that runs to completion even if the client disconnects.

    saving = tasks.start(save())
    await asyncio.shield(saving)
    ...
    await tasks.join()
    """

    def __init__(self, whole: TaskSet | None = None) -> None:
        """Starts nothing.

        Args:
            whole: a larger set, to which these tasks belong as well.
        """
        self._running: set[asyncio.Task[Any]] = set()
        self._whole = whole

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task for the work; await it through `asyncio.shield`."""
        task = start_owned(work) if self._whole is None else self._whole.start(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits the result of the work, which continues if the caller is cancelled."""
        return await asyncio.shield(self.start(work))

    async def join(self) -> None:
        """Waits until all work is done, including work that starts meanwhile."""
        while self._running:
            await asyncio.wait(self._running)
