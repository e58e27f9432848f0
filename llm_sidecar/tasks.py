"""Tasks that outlive the request that starts them, and the end of tasks.

A cancellation can get lost: `wait_for` of Python 3.11, with which redis-py sends, swallows it if it
arrives as the sending ends (https://github.com/python/cpython/issues/86296).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from llm_sidecar.logs import start_owned

T = TypeVar("T")
log = logging.getLogger(__name__)


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


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at the same time.

    Raises:
        Exception: the first one of any of them; the others are cancelled, and have ended.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cancel(*tasks: asyncio.Task[None], patience: float) -> None:
    """Cancels tasks, each up to ten times, because a cancellation can get lost.

    Returns when they have ended, or after `patience` seconds.
    """
    for _ in range(10):
        if not (pending := [task for task in tasks if not task.done()]):
            break
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=patience / 10)
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a cancelled task ended with %r", error)


async def first_success(*works: Coroutine[Any, Any, T]) -> T:
    """The result of the first work that succeeds; the others are cancelled.

    Raises:
        Exception: that of the first of `works`, if all fail.
    """
    if len(works) == 1:
        return await works[0]
    tasks = [asyncio.create_task(work) for work in works]
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            # The exception of every task is read, or asyncio would report it.
            succeeded = [task for task in tasks if task in done and task.exception() is None]
            if succeeded:
                return succeeded[0].result()
        return tasks[0].result()
    finally:
        for task in pending:
            task.cancel()


def raise_if_cancelled() -> None:
    """Repeats a cancellation of the current task that got lost."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
