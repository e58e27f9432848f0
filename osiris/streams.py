"""Collects a stream into one result, for routes that do not stream."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TypeVar

from llm_sidecar.models.base import Completion, Delta

T = TypeVar("T")


async def with_completion(
    stream: AsyncGenerator[Delta, None],
) -> AsyncGenerator[Delta | Completion, None]:
    """The deltas of a generation without log probabilities, and finally the whole completion."""
    # A long text has thousands of deltas, which take far more memory than their text.
    text, last = io.StringIO(), None
    async with contextlib.aclosing(stream):
        async for delta in stream:
            text.write(delta.text)
            last = delta
            yield delta
    yield Completion.of([] if last is None else [replace(last, text=text.getvalue())])


async def result_of(items: AsyncGenerator[object, None], kind: type[T]) -> T:
    """The last item of a stream; `kind` is its type."""
    last: object = None
    async with contextlib.aclosing(items):
        async for item in items:
            last = item
    assert isinstance(last, kind)
    return last
