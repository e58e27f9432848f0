"""Runs async work from synchronous code, until it ends or Ctrl-C cancels it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`. Ctrl-C cancels it; a second Ctrl-C also cancels its cleanup.

    asyncio alone handles a signal only when the main thread next runs Python code. That may be
    never, if another thread receives the signal, or if the main thread then waits for a database
    that does not respond.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        Exception: whatever the work raises.
    """
    # The program may have a handler of its own, and a shell makes background commands ignore
    # Ctrl-C.
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    try:
        return asyncio.run(_interruptible(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    return await work
