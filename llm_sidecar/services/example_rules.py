"""Few-shot examples: which corrections Phi-3 is shown, and why the others are not.

Every proposal takes longer with each example, and a bad example changes all proposals. So the size
of one example is limited, and the size of all examples.
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
"""Of the corrected proposal as compact JSON."""
MAX_TOKENS: Final = 3000
"""Of prompt and proposal together."""
CONTEXT_SHARE: Final = 0.5
"""The share of the model's context that all examples together may take."""
_TURN_TOKENS: Final = 16
"""The most tokens that a chat template adds around one turn."""


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
    """The greatest number of tokens that an example can take with any tokenizer.

    A token is at least one byte: the vocabularies in use are byte-level, or fall back to bytes for
    unknown text. English takes a third of this bound, or less.
    """
    text = example.prompt + dumps(example.proposal)
    return len(text.encode()) + 2 * _TURN_TOKENS


def proposal_refusal(proposal: dict[str, Any]) -> Outcome | None:
    """Why a corrected proposal cannot be in an example with any prompt; None where it can."""
    if not is_valid(proposal):
        return Outcome.INVALID
    if len(dumps(proposal)) > MAX_PROPOSAL_CHARS:
        return Outcome.PROPOSAL_TOO_LONG
    return None


def refusal(example: Example | Correction, context_length: int) -> Outcome | None:
    """Why a correction cannot be an example, even as the only one; None where it can.

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
        newest_first: corrections that can be examples.
        count: the greatest number of examples.
        context_length: of the model, in tokens.
    """
    chosen: list[Correction] = []
    left = _budget(context_length)
    for correction in newest_first[:count]:
        left -= token_bound(correction)
        if left < 0:
            break
        chosen.append(correction)
    return tuple(reversed(chosen))


def _budget(context_length: int) -> int:
    return int(CONTEXT_SHARE * context_length)
