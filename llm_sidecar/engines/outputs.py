"""What an engine returns: pieces of completions, tokens and the probabilities of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

FinishReason = Literal["stop", "length"]

LEAST_LOGPROB: Final = -9999.0
"""The logarithm of a probability of 0, which JSON cannot express; OpenAI's API uses the same."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, before temperature, penalties, filters
    and guidance.

    Attributes:
        id: of the token in the model's vocabulary.
        data: its bytes; a character may need several tokens.
        logprob: at least `LEAST_LOGPROB`; None for the first token of a prompt, which has no
            context.
        top: the most likely tokens at this position, most likely first, each without a `top`.
    """

    id: int
    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a generation: new text, and the counts so far.

    Attributes:
        cached_tokens: prompt tokens whose states were cached.
        finish_reason: set in the last delta only.
        logprobs: of the tokens of the new text, if requested; without the token that ends the turn.
        prompt_logprobs: of the prompt tokens that this step processed. They are complete with the
            first token of the completion at the latest.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """The probability of each of some answers.

    Attributes:
        probabilities: for each answer, the probability that the assistant's turn begins with it
            and not with a longer one of the answers. A turn may also begin with something else,
            so the sum is at most 1.
        prompt_tokens: of the chat; 0 if unknown.
        cached_tokens: prompt tokens that were not processed for this answer, because another prompt
            begins with them.
        adapter: the name of the adapter in use, or None.
    """

    probabilities: Mapping[str, float]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    adapter: str | None = None

    @property
    def mass(self) -> float:
        """The sum of the probabilities. If it is small, another answer is more likely."""
        return sum(self.probabilities.values())
