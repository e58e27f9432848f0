"""Collects what a model streams, for tests that need the whole text."""

from __future__ import annotations

import contextlib

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import ChatModel, Completion, GenerationRequest


async def complete(
    model: ChatModel,
    request: GenerationRequest,
    deadline: Deadline | None = None,
    *,
    allow_partial: bool = False,
) -> Completion:
    """The whole completion; cancelling it closes the stream."""
    stream = model.stream(request, deadline, allow_partial=allow_partial)
    async with contextlib.aclosing(stream):
        return Completion.of([delta async for delta in stream])
