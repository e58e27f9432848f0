"""How close a converted model is to its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MIN_EQUAL_GREEDY: Final = 0.8
"""Smallest share of equal greedy tokens. Perplexity alone does not distinguish two equally bad
models."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a model makes of the shipped text and of the sample chats.

    Attributes:
        text: digest of the tokens of all of it.
        tokens: number of tokens that were predicted.
        perplexity: exp of their mean negative log-likelihood, each passage on its own.
        greedy: the likeliest token at each of these positions.
        scores: the expected answer, 0 to 10, to each score chat.
    """

    text: str
    tokens: int
    perplexity: float
    greedy: list[int]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Quality:
    """A converted model's measurement against that of its source.

    Attributes:
        perplexity_ratio: its perplexity divided by the source's.
        equal_greedy: share of positions at which both find the same token likeliest.
        score_ranks: Spearman's rank correlation of the scores, from -1 to 1.
    """

    perplexity_ratio: float
    equal_greedy: float
    score_ranks: float

    def refusal(self, max_perplexity_ratio: float) -> str | None:
        """Why the model is not good enough, or None."""
        # Written so that NaN is refused.
        if not self.perplexity_ratio <= max_perplexity_ratio:
            return f"its perplexity is {self.perplexity_ratio:.3f} times that of the source"
        if not self.equal_greedy >= MIN_EQUAL_GREEDY:
            return f"the share of equal greedy tokens is only {self.equal_greedy:.3f}"
        return None


def compare(source: Measurement, result: Measurement) -> Quality:
    """The quality of `result`; both measurements must be of the same tokens."""
    same = np.equal(source.greedy, result.greedy)
    return Quality(
        result.perplexity / source.perplexity,
        float(same.mean()),
        rank_correlation(source.scores, result.scores),
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, with the mean rank for ties; 0 if either has equal values only.

    Spearman 1904, "The Proof and Measurement of Association between Two Things".
    """
    ranks = np.array([_ranks(np.asarray(first)), _ranks(np.asarray(second))])
    if not ranks.std(axis=1).all():
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ordered = np.sort(values)
    ranks: npt.NDArray[np.float64] = (
        ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right") - 1
    ) / 2
    return ranks
