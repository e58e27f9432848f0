"""Labelled prompts without end: a scene in a layout, its case and spelling disturbed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from llm_sidecar.demo.layouts import LAYOUTS
from llm_sidecar.demo.scene import Scene
from llm_sidecar.demo.situations import Side, answer
from llm_sidecar.demo.tickers import Split

_WORD: Final = re.compile(r"[a-z]{6,}")
"""What may be misspelt: of a shorter word too little is left to tell it from another."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt, and the proposal that follows from it by the rule of `situations`.

    Attributes:
        phrases: that tell the situation, as they were before case and spelling were disturbed.
        positions: those that tell the side.
        atr: average true range in percent as the prompt states it, or None.
    """

    prompt: str
    proposal: dict[str, Any]
    situation: str
    layout: str
    phrases: tuple[str, ...]
    positions: tuple[str, ...]
    atr: str | None

    @property
    def ticker(self) -> str:
        return str(self.proposal["ticker"])

    @property
    def side(self) -> Side | None:
        side: Side | None = self.proposal.get("side")
        return side


def labelled_prompts(seed: int, split: Split) -> Iterator[Labelled]:
    """Labelled prompts for ever, the same ones for the same seed."""
    rng = Random(f"{seed}/{split}")
    while True:
        yield labelled_prompt(rng, split)


def labelled_prompt(rng: Random, split: Split) -> Labelled:
    """One labelled prompt; in the training split it names no held-out ticker."""
    scene = Scene.draw(rng, split)
    layouts, shares = zip(*LAYOUTS, strict=True)
    layout = rng.choices(layouts, shares)[0]
    text = layout(scene).strip()
    text = scene.finish(_misspelt(_recased(text, rng), rng))
    # A phrase may have been drawn and not used.
    number = scene.number if scene.number and scene.number in text else None
    atr = scene.atr if scene.atr and scene.atr in text else None
    proposal = answer(scene.situation, scene.ticker, scene.side, number, atr)
    phrases, positions = (
        tuple(scene.finish(phrase) for phrase in told) for told in (scene.phrases, scene.positions)
    )
    return Labelled(text, proposal, scene.situation, layout.__name__, phrases, positions, atr)


def _recased(text: str, rng: Random) -> str:
    """The text in lower case in one of four; its codes stay as they are."""
    return text.lower() if rng.random() < 0.25 else text


def _misspelt(text: str, rng: Random) -> str:
    """Up to three typing errors in lower-case words, in one prompt of eight."""
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
