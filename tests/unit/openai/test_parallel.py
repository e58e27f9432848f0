"""Several streams at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from llm_sidecar.errors import QueueFull
from osiris.openai.parallel import AT_ONCE, merged
from tests.unit.fakes import until


class Source:
    """A stream of numbers.

    Attributes:
        begun, closed: whether it has begun and ended.
        given: how many numbers it has given.
    error: raised at the end.
    """

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.begun = self.closed = False
        self.given = 0
        self.error = error
        self._count = count

    async def stream(self) -> AsyncGenerator[int, None]:
        self.begun = True
        try:
            for number in range(self._count):
                self.given += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("streams", [1, 2, 20])
async def test_all_items_come_in_the_order_of_their_stream(streams: int) -> None:
    sources = [Source(3) for _ in range(streams)]
    found: dict[int, list[int]] = {}
    async for number, item in merged([one.stream() for one in sources]):
        found.setdefault(number, []).append(item)
    assert found == {number: [0, 1, 2] for number in range(streams)}
    assert all(one.closed for one in sources)


@pytest.mark.parametrize("streams", [1, 3])
async def test_the_first_error_ends_all(streams: int) -> None:
    sources = [Source(1, QueueFull("Full.")), *(Source(1000) for _ in range(streams - 1))]
    with pytest.raises(QueueFull):
        async for _ in merged([one.stream() for one in sources]):
            pass
    assert all(one.closed or not one.begun for one in sources)


async def test_a_cancellation_from_elsewhere_is_an_error() -> None:
    sources = [Source(1, asyncio.CancelledError()), Source(1)]
    with pytest.raises(RuntimeError, match="cancelled before its consumer"):
        async for _ in merged([one.stream() for one in sources]):
            pass


async def test_a_slow_consumer_makes_the_streams_wait() -> None:
    sources = [Source(1000) for _ in range(2)]
    items = merged([one.stream() for one in sources])
    await anext(items)
    await until(lambda: all(one.begun for one in sources))
    for _ in range(10):
        await asyncio.sleep(0)
    # One item waits in the queue, and each stream holds one.
    assert sum(one.given for one in sources) <= 4
    await items.aclose()
    assert all(one.closed for one in sources)


async def test_only_some_run_at_once() -> None:
    sources = [Source(1000) for _ in range(AT_ONCE + 4)]
    items = merged([one.stream() for one in sources])
    for _ in range(50):
        await anext(items)
    assert sum(one.begun for one in sources) == AT_ONCE
    await items.aclose()
    assert all(one.closed for one in sources[:AT_ONCE])
