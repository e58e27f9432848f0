"""What the demo models promise, measured through the engines that the server uses."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.demo import judgement
from llm_sidecar.demo.market import Case, draw
from llm_sidecar.demo.situations import SITUATIONS
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.proposals import Example

HANDWRITTEN: Final = Path(__file__).parent / "handwritten.jsonl"
CORRECTIONS: Final = Path(__file__).parent / "corrections.jsonl"
"""Prompts and how somebody corrected their proposals, written by hand; no training sees them."""
_HELD_OUT, _SCORED, _CRITICISED = 500, 200, 50
_SEED: Final = 20_260_101
"""Of the held-out prompts; training draws with other seeds, and other tickers."""
_NUMBER: Final = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured share or correlation, and what is promised of it.

    Attributes:
        promised: least acceptable value; None where nothing is promised.
        optional: whether it is of something that is off unless a user asks for it, so that missing
            it breaks nothing.
    """

    name: str
    value: float
    count: int
    promised: float | None = None
    optional: bool = False

    @property
    def kept(self) -> bool:
        """Whether the promise, if any, is kept."""
        return self.promised is None or self.value >= self.promised


def evaluate(folder: Path) -> list[Figure]:
    """All figures of the models in `folder`/phi3 and `folder`/hermes; takes about three minutes.

    Raises:
        ModelUnavailable: a model is not there.
    """
    phi3 = load_engine(folder / "phi3", device="cpu")
    figures = [*_held_out(phi3), *_with_examples(phi3), *_handwritten(phi3)]
    return [*figures, *_scores(load_engine(folder / "hermes", device="cpu"))]


def propose(engine: Engine, prompt: str, examples: Sequence[Example] = ()) -> dict[str, Any]:
    """The proposal for one prompt, as the server asks for it."""
    request = GenerationRequest(
        proposals.build_messages(prompt, examples),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
    )
    return proposals.parse("".join(delta.text for delta in engine.stream(request)))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank (Spearman 1904)."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def numbers(text: str) -> set[Decimal]:
    """The values of the numbers in a text: 1,200 and 1200.0 are the same."""
    return {Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)}


def _held_out_cases() -> list[Case]:
    rng = Random(_SEED)
    return [draw(rng, "held-out") for _ in range(_HELD_OUT)]


def _held_out(engine: Engine) -> list[Figure]:
    cases = _held_out_cases()
    written = _with_progress("held-out prompts", engine, [case.prompt for case in cases])
    pairs = list(zip(cases, written, strict=True))
    sided = [(case, got) for case, got in pairs if not _sideless(case)]
    return [
        _share("held-out: ticker copied", [_same(c, g, "ticker") for c, g in pairs], 0.99),
        _share("held-out: side right", [_same(c, g, "side") for c, g in sided], 0.99),
        _share("held-out: none made up", ["side" not in g for c, g in pairs if _sideless(c)]),
        _share("held-out: action", [_same(c, g, "action") for c, g in pairs]),
        _share("held-out: stop", [_same(c, g, "new_stop_pct") for c, g in pairs]),
        _share("held-out: target", [_same(c, g, "new_target_pct") for c, g in pairs]),
        _share(
            "held-out: situation named",
            [SITUATIONS[c.situation].keyword in g["rationale"].lower() for c, g in pairs],
        ),
        _share("held-out: numbers from the prompt", _taken(pairs)),
    ]


def _with_examples(engine: Engine) -> list[Figure]:
    """The held-out prompts again, behind few-shot examples of other tickers.

    Optional, as the server shows the demo model none unless it is asked to.
    """
    cases = _held_out_cases()
    figures: list[Figure] = []
    for count, name in ((1, "one example"), (3, "three examples")):
        rng = Random(_SEED + count)
        examples = [_examples(rng, case, count) for case in cases]
        prompts = [case.prompt for case in cases]
        written = _with_progress(f"prompts with {name}", engine, prompts, examples)
        pairs = list(zip(cases, written, strict=True))
        sided = [(case, got) for case, got in pairs if not _sideless(case)]
        for what, hits, promised in (
            ("ticker copied", [_same(c, g, "ticker") for c, g in pairs], 0.98),
            ("side right", [_same(c, g, "side") for c, g in sided], 0.98),
            ("numbers from the prompt", _taken(pairs), 0.97),
        ):
            figures.append(_share(f"{name}: {what}", hits, promised, optional=True))
    return figures


def _examples(rng: Random, case: Case, count: int) -> list[Example]:
    """So many of other tickers, half of them as the rule answers, half as people did."""
    corrections = [json.loads(line) for line in CORRECTIONS.read_text().splitlines()]
    found: list[Example] = []
    while len(found) < count:
        if rng.random() < 0.5:
            drawn = draw(rng, "held-out")
            example = Example(drawn.prompt, drawn.proposal)
        else:
            row = rng.choice(corrections)
            example = Example(row["prompt"], row["corrected_proposal"])
        if example.proposal["ticker"] != case.proposal["ticker"]:
            found.append(example)
    return found


def _handwritten(engine: Engine) -> list[Figure]:
    rows = [json.loads(line) for line in HANDWRITTEN.read_text().splitlines()]
    written = _with_progress("handwritten prompts", engine, [row["prompt"] for row in rows])
    pairs = list(zip(rows, written, strict=True))
    figures: list[Figure] = []
    for name, promised in (("all", 0.9), *((layout, None) for layout in _layouts(rows))):
        chosen = [(row, got) for row, got in pairs if name in ("all", row["layout"])]
        tickers = [row["ticker"] == got["ticker"] for row, got in chosen]
        sides = [row["side"] == got.get("side") for row, got in chosen if row["side"]]
        figures.append(_share(f"handwritten, {name}: ticker copied", tickers, promised))
        figures.append(_share(f"handwritten, {name}: side right", sides, promised))
    return figures


def _layouts(rows: list[dict[str, Any]]) -> list[str]:
    return sorted({row["layout"] for row in rows})


def _scores(engine: Engine) -> list[Figure]:
    rng = Random(_SEED)
    ratios: list[float] = []
    scores: list[float] = []
    while len(scores) < _SCORED:
        case = draw(rng, "held-out")
        proposal = judgement.varied(rng, case, fits=True)
        ratio = judgement.reward_to_risk(proposal)
        if ratio is None:
            continue
        messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, proposal, case.prompt)
        found = engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
        ratios.append(ratio)
        scores.append(hermes_plugin.expected_score(found))
    correlation = rank_correlation(ratios, scores)
    return [
        Figure("score against reward to risk: rank correlation", correlation, _SCORED, 0.9),
        _critiques(engine),
    ]


def _critiques(engine: Engine) -> Figure:
    """How often the first sentence has the right distances and the right word for them."""
    rng = Random(_SEED)
    right = []
    for _ in range(_CRITICISED):
        case = draw(rng, "held-out")
        proposal = judgement.varied(rng, case, fits=True)
        messages = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, proposal, case.prompt)
        written = "".join(d.text for d in engine.stream(GenerationRequest(messages, 100)))
        expected, _, _ = judgement.critique(proposal, fits=True).partition(". ")
        right.append(written.startswith(expected))
    return _share("critique: first sentence right", right)


def _taken(pairs: Sequence[tuple[Case, dict[str, Any]]]) -> list[bool]:
    """Of each rationale that has numbers, whether all of them are the prompt's."""
    return [
        numbers(got["rationale"]) <= numbers(case.prompt)
        for case, got in pairs
        if numbers(got["rationale"])
    ]


def _sideless(case: Case) -> bool:
    return "side" not in case.proposal


def _same(case: Case, got: dict[str, Any], field: str) -> bool:
    return bool(case.proposal.get(field) == got.get(field))


def _share(
    name: str, hits: list[bool], promised: float | None = None, *, optional: bool = False
) -> Figure:
    return Figure(name, sum(hits) / len(hits), len(hits), promised, optional)


def _with_progress(
    name: str,
    engine: Engine,
    prompts: list[str],
    examples: Iterable[Sequence[Example]] = itertools.repeat(()),
) -> list[dict[str, Any]]:
    written = []
    for number, (prompt, before) in enumerate(zip(prompts, examples, strict=False), 1):
        written.append(propose(engine, prompt, before))
        if sys.stderr.isatty() and number % 20 == 0:
            sys.stderr.write(f"\r{name}: {number} of {len(prompts)}")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return written
