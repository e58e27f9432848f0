"""Probabilities of short answers, from the logits after a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from llm_sidecar.engines.base import softmax
from llm_sidecar.engines.generation import Logits


class ChoiceTree:
    """The tokens of each choice after a prompt, as a tree.

    Each choice is encoded together with the prompt, because the boundary may change the tokens of
    both: a space at the end of a prompt becomes part of the answer's first token.

    Attributes:
        replaced: the number of tokens at the prompt's end that an answer replaces, usually none.
        tails: for each choice, its tokens after the rest of the prompt.
        paths: tokens to process after the rest of the prompt, a forward pass each. If the tokenizer
            splits digits, the only path of `0` to `10` is `1`: the logits before it give all first
            digits, those after it tell `1` from `10`.
    """

    def __init__(self, prompt: Sequence[int], encoded: Mapping[str, Sequence[int]]) -> None:
        """Builds the tree.

        Args:
            prompt: its tokens, or the last of them.
            encoded: for each choice, the tokens of the prompt followed by it.
        """
        shared = min(shared_length(prompt, tokens) for tokens in encoded.values())
        self.replaced = len(prompt) - shared
        self.tails = {choice: tuple(tokens[shared:]) for choice, tokens in encoded.items()}
        starts = {tail[:length] for tail in self.tails.values() for length in range(len(tail))}
        extended = {start[:length] for start in starts for length in range(len(start))}
        self.paths = sorted(starts - extended)

    def read(self, logits: Sequence[Iterable[Logits]]) -> dict[str, float]:
        """The probability of each choice: that of its tokens, without the longer choices that
        begin with them.

        Args:
            logits: for each path, those after the prompt and after each of the path's tokens,
                (1 + tokens of the path, vocabulary).
        """
        after = {
            path[:length]: softmax(row)
            for path, rows in zip(self.paths, logits, strict=True)
            for length, row in enumerate(rows)
        }
        found = {}
        for choice, tail in self.tails.items():
            steps = (after[tail[:length]][token] for length, token in enumerate(tail))
            longer = {
                other[len(tail)]
                for other in self.tails.values()
                if len(other) > len(tail) and other[: len(tail)] == tail
            }
            ends = 1.0 - sum(float(after[tail][token]) for token in longer)
            found[choice] = math.prod(map(float, steps)) * ends
        return found


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    for index, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return index
    return min(len(one), len(other))
