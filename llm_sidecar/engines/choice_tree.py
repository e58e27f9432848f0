"""Probabilities of short answers, from the logits of one prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from llm_sidecar.engines.base import softmax


class ChoiceTree:
    """Choices of one or two tokens; those of two tokens share the first one, `branch`.

    If the tokenizer splits digits, `0` to `10` form such a tree: `10` is `1`, then `0`. The logits
    at two positions, the prompt's last token and `branch`, then give all probabilities.
    """

    def __init__(self, encoded: Mapping[str, Sequence[int]]) -> None:
        branches = {tokens[0] for tokens in encoded.values() if len(tokens) == 2}
        if len(branches) > 1 or any(len(tokens) not in (1, 2) for tokens in encoded.values()):
            raise ValueError("the tokenizer splits the choices into more than one branch")
        self._encoded = dict(encoded)
        self.branch: int | None = branches.pop() if branches else None

    def read(self, first: npt.NDArray[Any], second: npt.NDArray[Any] | None) -> dict[str, float]:
        """The probability of each choice.

        Args:
            first: (vocabulary,) logits after the prompt.
            second: (vocabulary,) logits after the prompt and `branch`; None if there is no branch.
        """
        p_first = softmax(first)
        p_second = None if second is None else softmax(second)
        longer = [tokens[1] for tokens in self._encoded.values() if len(tokens) == 2]
        result = {}
        for choice, tokens in self._encoded.items():
            probability = float(p_first[tokens[0]])
            if p_second is not None and tokens[0] == self.branch:
                ends_here = 1.0 - float(p_second[longer].sum())
                probability *= float(p_second[tokens[1]]) if len(tokens) == 2 else ends_here
            result[choice] = probability
        return result
