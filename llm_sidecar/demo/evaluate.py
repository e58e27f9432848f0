"""What the demo models promise, measured through the engines that the server uses."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.demo import judgement
from llm_sidecar.demo.market import Case, draw
from llm_sidecar.demo.situations import SITUATIONS
from llm_sidecar.engines import Engine, GenerationRequest, load_engine

HANDWRITTEN: Final = Path(__file__).parent / "handwritten.jsonl"
_HELD_OUT, _SCORED, _CRITICISED = 500, 200, 50
_SEED: Final = 20_260_101
"""Of the held-out prompts; training draws with other seeds, and other tickers."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured share or correlation, and what is promised of it.

    Attributes:
        promised: least acceptable value; None where nothing is promised.
    """

    name: str
    value: float
    count: int
    promised: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the promise, if any, is kept."""
        return self.promised is None or self.value >= self.promised


def evaluate(folder: Path) -> list[Figure]:
    """All figures of the models in `folder`/phi3 and `folder`/hermes; takes about a minute.

    Raises:
        ModelUnavailable: a model is not there.
    """
    phi3 = load_engine(folder / "phi3", device="cpu")
    figures = [*_held_out(phi3), *_handwritten(phi3)]
    return [*figures, *_scores(load_engine(folder / "hermes", device="cpu"))]


def propose(engine: Engine, prompt: str) -> dict[str, Any]:
    """The proposal for one prompt, as the server asks for it."""
    request = GenerationRequest(
        proposals.build_messages(prompt), proposals.MAX_COMPLETION_TOKENS, proposals.GUIDANCE
    )
    return proposals.parse("".join(delta.text for delta in engine.stream(request)))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank (Spearman 1904)."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _held_out(engine: Engine) -> list[Figure]:
    rng = Random(_SEED)
    cases = [draw(rng, "held-out") for _ in range(_HELD_OUT)]
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
    ]


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
        found = engine.answer_probabilities(messages, hermes_plugin.SCORE_ANSWERS)
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


def _sideless(case: Case) -> bool:
    return "side" not in case.proposal


def _same(case: Case, got: dict[str, Any], field: str) -> bool:
    return bool(case.proposal.get(field) == got.get(field))


def _share(name: str, hits: list[bool], promised: float | None = None) -> Figure:
    return Figure(name, sum(hits) / len(hits), len(hits), promised)


def _with_progress(name: str, engine: Engine, prompts: list[str]) -> list[dict[str, Any]]:
    written = []
    for number, prompt in enumerate(prompts, 1):
        written.append(propose(engine, prompt))
        if sys.stderr.isatty() and number % 20 == 0:
            sys.stderr.write(f"\r{name}: {number} of {len(prompts)}")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return written
