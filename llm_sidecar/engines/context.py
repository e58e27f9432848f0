"""A prompt in the context of a model: whether it fits, and the steps of its prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llm_sidecar.engines.requests import ANSWER_TOKENS
from llm_sidecar.errors import InvalidRequest

PREFILL_CHUNK: Final = 256
"""Prompt tokens per prefill step; a request can be cancelled between two steps."""


def check_context(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raises InvalidRequest unless prompt and completion fit."""
    if prompt_tokens + max_tokens <= context_length:
        return
    if prompt_tokens + ANSWER_TOKENS > context_length:
        # A smaller max_length does not help here, and a score request has none.
        raise InvalidRequest(
            f"it takes {prompt_tokens} tokens, which is too many for the model's context "
            f"of {context_length}; shorten it",
            field="prompt",
            exceeds_context=True,
        )
    raise InvalidRequest(
        f"it takes {prompt_tokens} tokens, which with the tokens of the answer is more "
        f"than the model's context of {context_length}; shorten it, or ask for a shorter answer",
        field="prompt",
        exceeds_context=True,
    )


def prefill_steps(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Splits the tokens of a prompt into the slices of its prefill.

    Avoids one-token slices: kernels differ numerically for length 1, and a completion must not
    depend on how much of its prompt was cached.
    """
    while begin < end:
        stop = min(begin + PREFILL_CHUNK, end)
        if end - stop == 1 and stop - begin > 2:
            stop -= 1
        yield begin, stop
        begin = stop
