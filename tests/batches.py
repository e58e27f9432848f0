"""Texts that an engine generates in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm_sidecar import proposals
from llm_sidecar.engines import Engine, GenerationRequest
from llm_sidecar.engines.base import unless_failed
from tests.demo_cases import cases


def hundred_proposals(engine: Engine) -> list[dict[str, Any]]:
    """Guided proposals for a hundred market contexts.

    Raises:
        ValueError: one is not valid.
    """
    requests = [
        GenerationRequest(
            proposals.build_messages(case.prompt),
            proposals.MAX_COMPLETION_TOKENS,
            proposals.GUIDANCE,
        )
        for case in cases(100)
    ]
    return list(map(proposals.parse, texts_of(engine, requests)))


def texts_of(engine: Engine, requests: Sequence[GenerationRequest]) -> list[str]:
    """The texts of these requests, in their order."""
    batch, waiting = engine.batch(), iter(enumerate(requests))
    texts = [""] * len(requests)
    while _fill(batch, waiting):
        for number, result in batch.step():
            texts[number] += unless_failed(result).text
    return texts


def _fill(batch: Any, waiting: Iterator[tuple[int, GenerationRequest]]) -> bool:
    """Adds waiting requests while the batch has capacity; returns whether any request is left."""
    while len(batch) < batch.capacity:
        if (following := next(waiting, None)) is None:
            break
        batch.add(*following)
    return len(batch) > 0
