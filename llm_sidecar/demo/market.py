"""Synthetic market prompts and the proposals they should get: endless, seeded, in many layouts.

Two writers take turns, `prompts` and `variants`. Each has its own wordings and notations, so that
a model cannot live on the habits of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import Any, Final, NamedTuple

from llm_sidecar.demo import prompts, variants
from llm_sidecar.demo.situations import SITUATIONS, Side, answer
from llm_sidecar.demo.tickers import Split, random_ticker
from llm_sidecar.engines import Message
from llm_sidecar.proposals import Example, build_messages, dumps

_SHORTEST_LIMIT, _LONGEST_PROMPT = 60, 700
"""Characters: of every prompt at the beginning of training, and in the end."""
_SHORT_CHATS, _GROWING_CHATS = 12_000, 16_000
"""Chats with short prompts only, and chats over which the limit then grows."""
_STATED_ATR: Final = 0.25
_NO_SIDE: Final = 0.12
_WEIGHTS: Final = (3, 3, 3, 4, 4)


class Case(NamedTuple):
    """A prompt, and the proposal that the rule of `situations` gives for it."""

    prompt: str
    proposal: dict[str, Any]
    situation: str


def draw(rng: Random, split: Split, longest: int = _LONGEST_PROMPT) -> Case:
    """One random case of at most `longest` characters; its tickers are all of `split`."""
    while True:
        case = _first_writer(rng, split) if rng.random() < 0.5 else _second_writer(rng, split)
        if len(case.prompt) <= longest and case.proposal["ticker"] in case.prompt:
            return case


def _first_writer(rng: Random, split: Split) -> Case:
    labelled = prompts.labelled_prompt(rng, split)
    return Case(labelled.prompt, labelled.proposal, labelled.situation)


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
    told = variants.Told(rng, scene)
    prompt = rng.choices(variants.LAYOUTS, _WEIGHTS)[0](told)
    states_number = told.number_told and "<n>" in SITUATIONS[name].measured
    number = scene.number if states_number else None
    return Case(prompt, answer(name, scene.ticker, side, number, scene.atr), name)


def chats(seed: int, split: Split = "train") -> Iterator[list[Message]]:
    """Endless chats with Phi-3, short ones first, then with up to three few-shot examples.

    Among few words attention soon finds what to copy and what to judge; from there it learns to
    find them in long ones. Begun on long prompts, a model this small learns neither.
    """
    rng = Random(seed)
    for number in itertools.count():
        progress = min(1.0, max(0, number - _SHORT_CHATS) / _GROWING_CHATS)
        limit = _SHORTEST_LIMIT + round(progress * (_LONGEST_PROMPT - _SHORTEST_LIMIT))
        turns = rng.choice((1, 1, 2, 3, 4)) if progress > 0.3 else 1
        *before, last = (draw(rng, split, limit) for _ in range(turns))
        examples = [Example(case.prompt, case.proposal) for case in before]
        reply = {"role": "assistant", "content": dumps(last.proposal)}
        yield [*build_messages(last.prompt, examples), reply]
