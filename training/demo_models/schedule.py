"""Length, learning rates and batch sizes of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_WARM_UP: Final = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length, learning rates and batch sizes of a training run.

    Attributes:
        tokens: to train on, over all processes; leading system messages are not counted.
        batch_tokens: in one process's batch at the beginning, padding included.
        growth: factor by which `batch_tokens` grows until the end, when lessons are longer.
        matrix_rate: peak learning rate of the hidden matrices, which Muon trains.
        other_rate: peak learning rate of embeddings and norms, which AdamW trains.
        least_rate: final learning rates as a fraction of the peaks. Rates warm up over the first
            2 % of the tokens and then follow a cosine.
        repeated: largest fraction of lessons that repeat mispredicted ones; 0 where answers are
            sampled, as a misprediction then means nothing.
        int4: fraction of the training, at its end, in which weights are rounded to int4.
        prompt_loss: initial weight of the loss on the user's message; it falls linearly to 0.
        hard: fraction of lessons that are hard ones, if there is a source of those.
    """

    tokens: int
    batch_tokens: int = 1280
    growth: float = 3.0
    matrix_rate: float = 2e-2
    other_rate: float = 5e-3
    least_rate: float = 0.02
    repeated: float = 0.0
    int4: float = 0.0
    prompt_loss: float = 0.0
    hard: float = 0.0

    def rate(self, progress: float) -> float:
        """Learning rates as a fraction of their peaks, at a progress in [0, 1]."""
        warm_up = min(1.0, progress / _WARM_UP + 0.01)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return warm_up * (self.least_rate + (1.0 - self.least_rate) * cosine)

    def batch_size(self, progress: float) -> int:
        """Tokens in one process's batch at a progress in [0, 1]; it changes in four steps only, so
        that batches have few shapes."""
        growth = 1.0 + (self.growth - 1.0) * round(4.0 * progress) / 4.0
        return round(self.batch_tokens * growth)
