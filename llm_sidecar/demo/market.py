"""Synthetic market prompts and the proposals they should get: endless, seeded, in many layouts."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final, NamedTuple

from llm_sidecar.demo import layouts
from llm_sidecar.demo.situations import SITUATIONS, Side, answer
from llm_sidecar.demo.tickers import Split, random_ticker
from llm_sidecar.engines import Message
from llm_sidecar.proposals import Example, build_messages, dumps

_LONGEST_PROMPT: Final = 700
_STATED_ATR: Final = 0.25
_NO_SIDE: Final = 0.12
_WEIGHTS: Final = (3, 3, 3, 4, 4)


class Case(NamedTuple):
    """A prompt, and the proposal that the rule of `situations` gives for it."""

    prompt: str
    proposal: dict[str, Any]
    situation: str


def draw(rng: Random, split: Split) -> Case:
    """One random case; its tickers are all of `split`."""
    while True:
        case = _attempt(rng, split)
        if len(case.prompt) <= _LONGEST_PROMPT and case.proposal["ticker"] in case.prompt:
            return case


def _attempt(rng: Random, split: Split) -> Case:
    side: Side | None = rng.choice(("LONG", "SHORT")) if rng.random() > _NO_SIDE else None
    name = rng.choice(tuple(SITUATIONS))
    low, high, decimals = SITUATIONS[name].number
    scene = layouts.Scene(
        ticker=random_ticker(rng, split),
        side=side,
        situation=name,
        number=f"{rng.uniform(low, high):.{decimals}f}",
        atr=f"{rng.uniform(0.4, 4.8):.1f}" if rng.random() < _STATED_ATR else None,
        price=round(10 ** rng.uniform(0.3, 3.2), 2),
        split=split,
    )
    told = layouts.Told(rng, scene)
    prompt = rng.choices(layouts.LAYOUTS, _WEIGHTS)[0](told)
    states_number = told.number_told and "<n>" in SITUATIONS[name].measured
    number = scene.number if states_number else None
    return Case(prompt, answer(name, scene.ticker, side, number, scene.atr), name)


def chats(seed: int, split: Split = "train") -> Iterator[list[Message]]:
    """Endless chats with Phi-3, with up to two few-shot examples before the prompt."""
    rng = Random(seed)
    while True:
        *before, last = (draw(rng, split) for _ in range(rng.choice((1, 1, 2, 3))))
        examples = [Example(case.prompt, case.proposal) for case in before]
        reply = {"role": "assistant", "content": dumps(last.proposal)}
        yield [*build_messages(last.prompt, examples), reply]
