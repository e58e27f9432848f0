"""How long, how fast and on how much at a time a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_WARM_UP: Final = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        tokens: to train on, in all processes together, without the system messages that many
            lessons share.
        batch_tokens: in one process's batch, padding included, at the beginning.
        growth: times as many there are in it in the end, when lessons are longer.
        matrix_rate: greatest learning rate of the hidden matrices, which Muon trains.
        other_rate: that of embeddings and norms, which AdamW trains. Both warm up over the first
            2 % and fall as a cosine.
        least_rate: the part of both that is left in the end.
        again: the most of the lessons that may be ones which were missed before; none where
            answers are drawn, and being missed says nothing.
        rounded: part of the training, its last, in which weights are as int4 will hold them.
        language: weight of the loss on what the user says, at the beginning; it falls to none.
        mined: part of the lessons that are hard ones, where there is a teacher of those.
    """

    tokens: int
    batch_tokens: int = 1280
    growth: float = 3.0
    matrix_rate: float = 2e-2
    other_rate: float = 5e-3
    least_rate: float = 0.02
    again: float = 0.0
    rounded: float = 0.0
    language: float = 0.0
    mined: float = 0.0

    def rate(self, progress: float) -> float:
        """Part of the greatest learning rates, when that part of the training is done."""
        warm_up = min(1.0, progress / _WARM_UP + 0.01)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return warm_up * (self.least_rate + (1.0 - self.least_rate) * cosine)

    def batch_size(self, progress: float) -> int:
        """Tokens in one process's batch, when that part is done: in few steps, for few shapes."""
        growth = 1.0 + (self.growth - 1.0) * round(4.0 * progress) / 4.0
        return round(self.batch_tokens * growth)
