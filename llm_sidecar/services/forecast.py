"""What a proposal, its critique and its score will take, from the measured speeds of the models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

from llm_sidecar.models.base import Models, Speed

CONTEXT_TOKENS: Final = 256
"""Tokens of the market context that is assumed."""
PROPOSAL_TOKENS: Final = 96
"""Tokens of a proposal whose rationale is as long as it may be, in English: 90 with the tokenizer
of the demo models, 96 with that of SmolLM2."""
SCORE_TOKENS: Final = 32
"""Prompt tokens of a score that its critique did not have: the task and the header of the turn."""
SCORE_STEPS: Final = 2
"""Decode steps of a score: the second one is for the answer 10, whose digits are two tokens."""
_MARGIN: Final = 1.3
"""A deadline should be longer than the forecast by this factor."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds that a request takes alone on the machine; None while the model is not loaded.

    The system prompts and the few-shot examples are cached. Each token of the proposal counts as a
    decode step, so that runtimes which append forced tokens are faster.

    Attributes:
        proposal, critique: of the longest proposal, and of the longest critique.
        score: after the critique, whose prompt it shares.
    """

    proposal: float | None
    critique: float | None
    score: float | None

    @classmethod
    def of(cls, models: Models, critique_tokens: int) -> Self:
        """The forecast of these models.

        Args:
            critique_tokens: maximum number of tokens of a critique.
        """
        phi3, hermes = models.phi3.status().speed, models.hermes.status().speed
        return cls(
            _seconds(phi3, CONTEXT_TOKENS, PROPOSAL_TOKENS),
            _seconds(hermes, CONTEXT_TOKENS + PROPOSAL_TOKENS, critique_tokens),
            _seconds(hermes, SCORE_TOKENS, SCORE_STEPS),
        )

    @property
    def total(self) -> float | None:
        """The sum; None while one part is unknown."""
        if self.proposal is None or self.critique is None or self.score is None:
            return None
        return self.proposal + self.critique + self.score

    def warning(self, timeout: float) -> str | None:
        """What to set if a deadline cannot hold the sum; None if it can, or if it is unknown."""
        if self.total is None or self.total <= timeout:
            return None
        advised = 10 * math.ceil(self.total * _MARGIN / 10)
        return (
            f"A proposal with its critique and score takes about {self.total:.0f} s, longer than "
            f"REQUEST_TIMEOUT_SECONDS={timeout:g}; set it to {advised}, or use smaller models."
        )


def _seconds(speed: Speed | None, prompt_tokens: int, completion_tokens: int) -> float | None:
    return None if speed is None else speed.seconds(prompt_tokens, completion_tokens)
