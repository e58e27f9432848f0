"""Cases of the demo models' synthetic market."""

from __future__ import annotations

from random import Random

from training.demo_models import market
from training.demo_models.cases import Case


def cases(count: int, seed: int = 1) -> list[Case]:
    """`count` cases of the training split, the same ones for the same seed."""
    rng = Random(seed)
    return [market.draw(rng, "train") for _ in range(count)]
