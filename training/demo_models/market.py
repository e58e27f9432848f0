"""Synthetic market prompts and the proposals they should get: endless, seeded, in many layouts.

Two writers take turns, `prompts` and `variants`. Each has its own wordings and notations, so that
a model does not overfit to the habits of one.
"""

from __future__ import annotations

from random import Random
from typing import Final

from training.demo_models import prompts, variants
from training.demo_models.cases import Case
from training.demo_models.situations import SITUATIONS, Side, answer
from training.demo_models.tickers import Split, random_ticker

LONGEST_PROMPT: Final = 700
"""Characters of the longest prompt."""
_STATED_ATR: Final = 0.25
"""Share of prompts that state an average true range."""
_NO_SIDE: Final = 0.18
"""Share of prompts that state no side."""
_WEIGHTS: Final = (3, 3, 3, 4, 4)
"""Of `variants.LAYOUTS`."""


def draw(rng: Random, split: Split, longest: int = LONGEST_PROMPT) -> Case:
    """One random case of at most `longest` characters; its tickers are all of `split`."""
    while True:
        case = prompts.draw(rng, split) if rng.random() < 0.5 else _second_writer(rng, split)
        if len(case.prompt) <= longest and case.proposal["ticker"] in case.prompt:
            return case


def _second_writer(rng: Random, split: Split) -> Case:
    side: Side | None = rng.choice(("LONG", "SHORT")) if rng.random() > _NO_SIDE else None
    name = rng.choice(tuple(SITUATIONS))
    low, high, decimals = SITUATIONS[name].number
    scene = variants.Scene(
        ticker=random_ticker(rng, split),
        side=side,
        situation=name,
        number=f"{rng.uniform(low, high):.{decimals}f}",
        atr=f"{rng.uniform(0.4, 4.8):.1f}" if rng.random() < _STATED_ATR else None,
        price=round(10 ** rng.uniform(0.3, 3.2), 2),
        split=split,
    )
    draft = variants.Draft(rng, scene)
    prompt = rng.choices(variants.LAYOUTS, _WEIGHTS)[0](draft)
    states_number = draft.number_stated and "<n>" in SITUATIONS[name].measured
    number = scene.number if states_number else None
    proposal = answer(name, scene.ticker, side, number, scene.atr)
    return Case(prompt, proposal, name, draft.phrases, draft.positions, scene.atr)
