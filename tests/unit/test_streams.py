"""Streams collected into one result."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from llm_sidecar.models.base import Completion, Delta
from osiris.streams import completed, result_of

LAST = Delta(" world", "hermes/fake", "20260102", 7, 2, 3, "stop")


async def test_a_generation_is_its_whole_text_with_the_last_counts() -> None:
    async def stream() -> AsyncGenerator[Delta, None]:
        yield Delta("Hello", "hermes/fake", "20260102", 7, 1, 3)
        yield LAST

    assert await completed(stream()) == Completion(
        "Hello world", "hermes/fake", "20260102", "stop", 7, 2, 3
    )


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
