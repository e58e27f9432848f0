"""Handlers of channels, each with a queue and a task of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llm_sidecar.event_bus.payload_queue import PayloadQueue
from llm_sidecar.logs import start_detached
from llm_sidecar.tasks import cancel

Handler = Callable[[str], Awaitable[None]]
"""Takes the payload of one message."""
BatchHandler = Callable[[list[str]], Awaitable[None]]
"""Takes the payloads of several messages, oldest first."""

log = logging.getLogger(__name__)


class Handlers:
    """Calls handlers with the payloads of their queues.

    Attributes:
        errors: how many calls have raised an error.
    """

    def __init__(self) -> None:
        self.errors = 0
        self._queues: dict[asyncio.Task[None], PayloadQueue] = {}

    def add(self, channel: str, handler: BatchHandler, queue: PayloadQueue, most: int) -> None:
        """Starts to call a handler, with at most `most` payloads at once."""
        work = self._serve(channel, handler, queue, most)
        self._queues[start_detached(work, name=f"event-bus {channel}")] = queue

    async def close(self, *, drain: float, patience: float) -> None:
        """Gives the handlers `drain` seconds for the waiting payloads, then ends them."""
        try:
            async with asyncio.timeout(drain):
                for queue in self._queues.values():
                    await queue.join()
        except TimeoutError:
            log.warning("event handlers did not finish within %.0f s", drain)
        await cancel(*self._queues, patience=patience)

    async def _serve(
        self, channel: str, handler: BatchHandler, queue: PayloadQueue, most: int
    ) -> None:
        while True:
            payloads = [await queue.get()]
            while len(payloads) < most and not queue.empty():
                payloads.append(queue.get_nowait())
            try:
                await handler(payloads)
            except (Exception, asyncio.CancelledError):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the bus closes; otherwise the handler's own work was cancelled
                self.errors += 1
                log.exception("a handler of %s failed", channel)
            finally:
                for _ in payloads:
                    queue.task_done()
