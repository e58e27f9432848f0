"""Merges several streams that run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeVar

from llm_sidecar.tasks import raise_if_cancelled

T = TypeVar("T")

AT_ONCE: Final = 8
"""Maximum number of concurrent streams of one request; others wait, so that one request with many
prompts does not fill the queue of a model."""


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they arrive, each with the number of its stream.

    The streams wait for a slow consumer. The first error ends all of them.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(1)
    turns = asyncio.Semaphore(AT_ONCE)

    async def run(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with turns, contextlib.aclosing(stream):
                async for item in stream:
                    await items.put((number, item))
        except asyncio.CancelledError:
            raise_if_cancelled()
            await items.put(RuntimeError("a stream was cancelled before its consumer closed it"))
        except Exception as error:  # noqa: BLE001 - the consumer raises it
            await items.put(error)
        await items.put(None)

    tasks = [asyncio.create_task(run(*numbered)) for numbered in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            found = await items.get()
            if found is None:
                running -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
