"""Collects a stream into one result, for routes that do not stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

from llm_sidecar.models.base import Completion, Delta

T = TypeVar("T")


async def completed(stream: AsyncGenerator[Delta, None]) -> Completion:
    """The completion that the deltas of a generation form."""
    async with contextlib.aclosing(stream):
        return Completion.of([delta async for delta in stream])


async def result_of(items: AsyncGenerator[object, None], kind: type[T]) -> T:
    """The last item of a stream; `kind` is its type."""
    last: object = None
    async with contextlib.aclosing(items):
        async for item in items:
            last = item
    assert isinstance(last, kind)
    return last
