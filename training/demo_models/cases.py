"""A labelled prompt of the synthetic market."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A prompt, and the proposal that the rule of `situations` gives for it.

    Attributes:
        situation: key of `SITUATIONS`.
        phrases: parts of the prompt about the situation, before changes of case and typing errors.
        positions: parts of the prompt that state the side, likewise.
        atr: average true range in percent as the prompt states it, or None.
    """

    prompt: str
    proposal: dict[str, Any]
    situation: str
    phrases: Sequence[str] = ()
    positions: Sequence[str] = ()
    atr: str | None = None
