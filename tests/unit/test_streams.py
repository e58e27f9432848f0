"""Streams collected into one result."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from llm_sidecar.models.base import Completion, Delta
from osiris.streams import result_of, with_completion

LAST = Delta(" world", "hermes/fake", "20260102", 7, 2, 3, "stop")


async def test_after_the_deltas_comes_the_whole_text_with_the_last_counts() -> None:
    first = Delta("Hello", "hermes/fake", "20260102", 7, 1, 3)

    async def stream() -> AsyncGenerator[Delta, None]:
        yield first
        yield LAST

    whole = Completion("Hello world", "hermes/fake", "20260102", "stop", 7, 2, 3)
    assert [item async for item in with_completion(stream())] == [first, LAST, whole]


async def test_the_result_is_the_last_item() -> None:
    async def items() -> AsyncGenerator[object, None]:
        yield "progress"
        yield LAST

    assert await result_of(items(), Delta) is LAST


async def test_a_stream_that_fails_is_closed_and_its_error_raised() -> None:
    closed = []

    async def items() -> AsyncGenerator[object, None]:
        try:
            yield "progress"
            raise KeyError("a defect")
        finally:
            closed.append(True)

    with pytest.raises(KeyError, match="a defect"):
        await result_of(items(), Delta)
    assert closed == [True]
