"""The first writer of prompts: a scene in a layout, with random case and typing errors."""

from __future__ import annotations

import re
from random import Random
from typing import Final

from training.demo_models.cases import Case
from training.demo_models.layouts import LAYOUTS
from training.demo_models.scene import Scene
from training.demo_models.situations import answer
from training.demo_models.tickers import Split

_WORD: Final = re.compile(r"[a-z]{6,}")
"""Words that may be misspelt; a shorter one might turn into another word."""


def draw(rng: Random, split: Split) -> Case:
    """One random case; all its tickers are of `split`."""
    scene = Scene.draw(rng, split)
    layouts, shares = zip(*LAYOUTS, strict=True)
    text = rng.choices(layouts, shares)[0](scene).strip()
    text = scene.finish(_misspelt(_recased(text, rng), rng))
    # A template may have filled a slot and then not been used.
    number = scene.number if scene.number and scene.number in text else None
    atr = scene.atr if scene.atr and scene.atr in text else None
    proposal = answer(scene.situation, scene.ticker, scene.side, number, atr)
    phrases, positions = (
        tuple(scene.finish(phrase) for phrase in found)
        for found in (scene.phrases, scene.positions)
    )
    return Case(text, proposal, scene.situation, phrases, positions, atr)


def _recased(text: str, rng: Random) -> str:
    """The text, in lower case one time in four; codes keep their case."""
    return text.lower() if rng.random() < 0.25 else text


def _misspelt(text: str, rng: Random) -> str:
    """The text, one time in eight with up to three typing errors in lower-case words."""
    if rng.random() < 0.125:
        for _ in range(rng.randrange(1, 4)):
            words = list(_WORD.finditer(text))
            if not words:
                break
            word = rng.choice(words)
            at = rng.randrange(word.start(), word.end() - 1)
            swap, drop, twice = text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]
            text = text[:at] + rng.choice((swap, drop, twice)) + text[at + 2 :]
    return text
