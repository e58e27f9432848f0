"""Watches facts for changes by other sidecars: at once after a message, else within a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.facts import Fact, Facts
from llm_sidecar.event_bus.redis_errors import is_denial, reason
from llm_sidecar.event_bus.subscriber import Subscriber

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks, because a message may be lost."""
_MOST_NEWS: Final = 1_000

log = logging.getLogger(__name__)


class FactWatcher:
    """Looks at facts, and touches those whose data has changed here.

    While Redis is away, it waits. It then notices every change that it has missed.

    Args:
        facts: of one Redis.
        subscriber: receives the messages, and reports whether Redis is connected.
        denied: what Redis denies.
    """

    def __init__(self, facts: Facts, subscriber: Subscriber, denied: Denied) -> None:
        self._facts = facts
        self._subscriber = subscriber
        self._denied = denied
        self._operation = f"GET or SET {facts.prefix}.*"
        self._news: asyncio.Queue[str] = asyncio.Queue(_MOST_NEWS)
        self._watched: dict[str, Callable[[Fact], None]] = {}
        self._seen: dict[str, Fact] = {}
        self._untouched: set[str] = set()

    def watch(self, name: str, on_change: Callable[[Fact], None]) -> None:
        """Calls `on_change` with the fact at the first look, and after each change."""
        self._watched[name] = on_change
        self._look_now()

    def touch_soon(self, name: str) -> None:
        """Changes the version of a fact that has no value, as soon as Redis is connected."""
        self._untouched.add(name)
        self._look_now()

    async def run(self) -> None:
        """Looks until it is cancelled."""
        # Subscribe to nothing until a fact is watched or touched.
        await self._news.get()
        await self._subscriber.add(self._facts.channel, self._news)
        while True:
            await self._subscriber.here.wait()
            if self._denied.permits(self._operation):
                await self._look_and_touch()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._news.get()
            while not self._news.empty():
                self._news.get_nowait()

    async def _look_and_touch(self) -> None:
        try:
            await self._look()
            await self._touch()
        except RedisError as error:
            if is_denial(error):
                self._denied.add(self._operation)
            else:
                log.debug("the facts cannot be read: %s", reason(error))
                self._subscriber.check()
        else:
            self._denied.remove(self._operation)

    async def _look(self) -> None:
        names = list(self._watched)
        for name, fact in zip(names, await self._facts.get_all(names), strict=True):
            if self._seen.get(name) != fact:
                self._seen[name] = fact
                self._watched[name](fact)

    async def _touch(self) -> None:
        for name in list(self._untouched):
            # Removed first: it may be added again while Redis answers.
            self._untouched.discard(name)
            try:
                await self._facts.touch(name)
            except RedisError:
                self._untouched.add(name)
                raise

    def _look_now(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._news.put_nowait("")
