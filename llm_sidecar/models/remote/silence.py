"""A time limit for a server that sends nothing, neither to this request nor to any other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from llm_sidecar.models.remote.connection import Connection


class Silent(Exception):
    """The server has sent nothing for too long.

    Attributes:
        seconds: for how long.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing for {seconds:g} s")
        self.seconds = seconds


@contextlib.asynccontextmanager
async def silence_limit(connection: Connection, seconds: float | None) -> AsyncIterator[None]:
    """Cancels what runs in the context once the server has sent nothing for `seconds`.

    A plain timeout would also end a request that waits in the queue of a busy server.

    Args:
        connection: to the server.
        seconds: None for no limit.

    Raises:
        Silent
    """
    if seconds is None:
        yield
        return
    loop, began = asyncio.get_running_loop(), time.monotonic()
    timer: asyncio.TimerHandle

    def check() -> None:
        nonlocal timer
        left = seconds - (time.monotonic() - max(began, connection.last_byte))
        if left <= 0:
            limit.reschedule(loop.time())
        else:
            timer = loop.call_later(left, check)

    timer = loop.call_later(max(0.0, seconds), check)
    try:
        async with asyncio.timeout(None) as limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise Silent(seconds) from None
        raise
    finally:
        timer.cancel()
