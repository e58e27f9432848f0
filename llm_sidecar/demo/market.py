"""Synthetic market prompts and the proposals they should get: endless, seeded, in many layouts.

Two writers take turns, `prompts` and `variants`. Each has its own wordings and notations, so that
a model cannot live on the habits of one.
"""

from __future__ import annotations

from random import Random
from typing import Any, Final, NamedTuple

from llm_sidecar.demo import prompts, variants
from llm_sidecar.demo.situations import SITUATIONS, Side, answer
from llm_sidecar.demo.tickers import Split, random_ticker
from llm_sidecar.demo.training import Lesson, Teacher
from llm_sidecar.engines import Message
from llm_sidecar.proposals import Example, build_messages, dumps

_SHORTEST_LIMIT, _LONGEST_PROMPT = 70, 700
"""Characters: of every prompt at the beginning of training, and in the end."""
_SHORT, _LONG, _FINAL = 0.2, 0.55, 0.72
"""Parts of the training: until the first prompts are short, from the second as long as any, from
the third as the server sends them."""
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


def teacher(seed: int, split: Split = "train") -> Teacher:
    """Phi-3's lessons: single short prompts and pieces of their answers first, whole chats last.

    Among few words attention soon finds what to copy and what to judge; from there it learns to
    find them in long ones. Begun on long prompts, a model this small learns neither. A short
    prompt without the system's, with one piece of its answer, is a lesson at a fifth of the cost.
    """
    rng = Random(seed)

    def lesson(progress: float) -> Lesson:
        grown = min(1.0, max(0.0, (progress - _SHORT) / (_LONG - _SHORT)))
        limit = _SHORTEST_LIMIT + round(grown * (_LONGEST_PROMPT - _SHORTEST_LIMIT))
        final = progress > _FINAL
        whole = rng.random() < (0.8 if final else 0.05 + 0.4 * grown)
        turns = rng.choice((1, 1, 1, 1, 2, 3)) if whole and final else 1
        *before, last = (draw(rng, split, limit) for _ in range(turns))
        examples = [Example(case.prompt, case.proposal) for case in before]
        text = dumps(last.proposal)
        messages = [*build_messages(last.prompt, examples), Message(role="assistant", content=text)]
        if not final and rng.random() > 0.3 * grown:
            messages = messages[1:]
        if whole:
            return Lesson(messages)
        if rng.random() < 0.65:
            # Up to `new`, so that no side is something to learn too.
            return Lesson(messages, last=text.index('_stop_pct"'))
        return Lesson(messages, first=text.index('"rationale"'))

    return lesson
