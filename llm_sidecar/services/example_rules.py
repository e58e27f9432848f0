"""Selects the corrections that become few-shot examples, and gives reasons for the others.

Each example makes every proposal slower, and a bad example affects all proposals. So the size of
each example and the total size are limited.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Final

from llm_sidecar.db import Correction
from llm_sidecar.proposals import Example, dumps, is_valid
from llm_sidecar.text import find_fault

EXAMPLE_PROMPT_CHARS: Final = 2000
MAX_PROPOSAL_CHARS: Final = 500
"""Characters of the corrected proposal as compact JSON."""
MAX_TOKENS: Final = 3000
"""Tokens of an example: its prompt and its proposal."""
CONTEXT_SHARE: Final = 0.5
"""The share of the model's context that all examples may take in total."""
_TURN_TOKENS: Final = 16
"""Maximum number of tokens that a chat template adds around one turn."""


class Outcome(enum.Enum):
    """Whether feedback is a few-shot example, or the reason why not."""

    EXAMPLE = enum.auto()
    NO_CORRECTION = enum.auto()
    INVALID = enum.auto()
    PROPOSAL_TOO_LONG = enum.auto()
    OFF = enum.auto()
    DATABASE_AWAY = enum.auto()
    NO_RUN = enum.auto()
    PROMPT_NOT_TEXT = enum.auto()
    PROMPT_TOO_LONG = enum.auto()
    TOO_MANY_TOKENS = enum.auto()
    WITHDRAWN = enum.auto()
    REPLACED = enum.auto()
    CROWDED_OUT = enum.auto()


def token_bound(example: Example | Correction) -> int:
    """An upper bound on the tokens of an example, for any tokenizer.

    A token is at least one byte: the vocabularies in use are byte-level, or fall back to bytes for
    unknown text. English takes a third of this bound, or less.
    """
    text = example.prompt + dumps(example.proposal)
    return len(text.encode()) + 2 * _TURN_TOKENS


def proposal_refusal(proposal: dict[str, Any]) -> Outcome | None:
    """Why a corrected proposal cannot be in any example; None if it can."""
    if not is_valid(proposal):
        return Outcome.INVALID
    if len(dumps(proposal)) > MAX_PROPOSAL_CHARS:
        return Outcome.PROPOSAL_TOO_LONG
    return None


def refusal(example: Example | Correction, context_length: int) -> Outcome | None:
    """Why a correction cannot be an example, even the only one; None if it can.

    Args:
        context_length: of the model, in tokens.
    """
    if (refused := proposal_refusal(example.proposal)) is not None:
        return refused
    # Earlier versions did not check texts, and stored prompts with control characters.
    if find_fault(example.prompt) is not None:
        return Outcome.PROMPT_NOT_TEXT
    if len(example.prompt) > EXAMPLE_PROMPT_CHARS:
        return Outcome.PROMPT_TOO_LONG
    if token_bound(example) > min(MAX_TOKENS, _budget(context_length)):
        return Outcome.TOO_MANY_TOKENS
    return None


def select(
    newest_first: Sequence[Correction], count: int, context_length: int
) -> tuple[Correction, ...]:
    """The newest corrections that fit half of the context, oldest first.

    Args:
        newest_first: corrections without a `refusal`, newest first.
        count: the maximum number of examples.
        context_length: of the model, in tokens.
    """
    selected: list[Correction] = []
    left = _budget(context_length)
    for correction in newest_first[:count]:
        left -= token_bound(correction)
        if left < 0:
            break
        selected.append(correction)
    return tuple(reversed(selected))


def _budget(context_length: int) -> int:
    return int(CONTEXT_SHARE * context_length)
