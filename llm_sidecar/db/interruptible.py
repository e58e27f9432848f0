"""Runs async work to its end, or to Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, which Ctrl-C cancels; a second one does not wait for what it tidies up.

    By itself asyncio sees a signal when the main thread next does something. That may be never, if
    the signal came to another thread, or just before this one began to wait for a database that is
    silent.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        Exception: whatever the work raises.
    """
    # Another handler is the program's own; and who starts a command in the background of a script
    # has it ignore Ctrl-C.
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
