"""Measures the demo models against their targets, through the engines that the server uses."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import numpy as np

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.models.prompts import Prompts, read_prompts
from llm_sidecar.proposals import Example

_HERE: Final = Path(__file__).parent
HANDWRITTEN: Final = _HERE / "handwritten.jsonl"
CORRECTIONS: Final = _HERE / "corrections.jsonl"
"""Prompts with proposals corrected by hand; the demo models were not trained on them."""
PROPOSALS: Final = _HERE / "held_out_proposals.jsonl"
SCORES: Final = _HERE / "held_out_scores.jsonl"
"""Held-out cases, which `training.demo_models.held_out` draws and describes."""
EXAMPLE_COUNTS: Final = (1, 3)
"""The numbers of few-shot examples that each held-out prompt has."""
CRITICISED: Final = 50
"""The first lines of `SCORES`, which also have the right critique."""
_NUMBER: Final = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")


Row = dict[str, Any]
"""One line of a file of cases, or a proposal."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured share or correlation, in [-1, 1], and its target.

    Attributes:
        count: the number of cases that it was measured on.
        target: the least acceptable value, or None.
        optional: whether it measures a feature that is off by default; the evaluation then passes
            even if the target is missed.
    """

    name: str
    value: float
    count: int
    target: float | None = None
    optional: bool = False

    @property
    def met(self) -> bool:
        """Whether the value reaches the target, if there is one."""
        return self.target is None or self.value >= self.target


def evaluate(folder: Path) -> list[Figure]:
    """Returns all figures of the models in `folder`/phi3 and `folder`/hermes, after some minutes.

    Raises:
        ModelUnavailable: a model is missing or does not load.
    """
    phi3 = load_engine(folder / "phi3", device="cpu")
    figures = [*_held_out(phi3), *_with_examples(phi3), *_handwritten(phi3)]
    prompts = read_prompts(folder / "hermes") or hermes_plugin.PROMPTS
    return [*figures, *_scores(load_engine(folder / "hermes", device="cpu"), prompts)]


def propose(engine: Engine, prompt: str, examples: Sequence[Example] = ()) -> Row:
    """Generates the proposal for one prompt, with the chat and the guidance of the server."""
    request = GenerationRequest(
        proposals.build_messages(prompt, examples),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
    )
    return proposals.parse("".join(delta.text for delta in engine.stream(request)))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation (Spearman 1904); equal values share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def numbers(text: str) -> set[Decimal]:
    """The values of the numbers in a text; 1,200 and 1200.0 have the same value."""
    return {Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)}


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _held_out(engine: Engine) -> list[Figure]:
    rows = _rows(PROPOSALS)
    pairs = _propose_all("held-out prompts", engine, rows)
    sided = [(row, got) for row, got in pairs if _has_side(row)]
    return [
        _share("held-out: ticker copied", [_same(r, g, "ticker") for r, g in pairs], 0.99),
        _share("held-out: side right", [_same(r, g, "side") for r, g in sided], 0.99),
        _share("held-out: none made up", ["side" not in g for r, g in pairs if not _has_side(r)]),
        _share("held-out: action", [_same(r, g, "action") for r, g in pairs]),
        _share("held-out: stop", [_same(r, g, "new_stop_pct") for r, g in pairs]),
        _share("held-out: target", [_same(r, g, "new_target_pct") for r, g in pairs]),
        _share(
            "held-out: situation named",
            [row["keyword"] in got["rationale"].lower() for row, got in pairs],
        ),
        _share("held-out: numbers from the prompt", _numbers_from_prompt(pairs)),
    ]


def _with_examples(engine: Engine) -> list[Figure]:
    """The held-out prompts again, after few-shot examples of other tickers.

    Optional: by default the server gives the demo model no examples.
    """
    rows = _rows(PROPOSALS)
    corrections = [Example(row["prompt"], row["corrected_proposal"]) for row in _rows(CORRECTIONS)]
    figures: list[Figure] = []
    for count, name in zip(EXAMPLE_COUNTS, ("one example", "three examples"), strict=True):
        examples = [
            [
                corrections[example] if isinstance(example, int) else Example(**example)
                for example in row["examples"][str(count)]
            ]
            for row in rows
        ]
        pairs = _propose_all(f"prompts with {name}", engine, rows, examples)
        sided = [(row, got) for row, got in pairs if _has_side(row)]
        for what, hits, target in (
            ("ticker copied", [_same(r, g, "ticker") for r, g in pairs], 0.98),
            ("side right", [_same(r, g, "side") for r, g in sided], 0.98),
            ("numbers from the prompt", _numbers_from_prompt(pairs), 0.97),
        ):
            figures.append(_share(f"{name}: {what}", hits, target, optional=True))
    return figures


def _handwritten(engine: Engine) -> list[Figure]:
    rows = _rows(HANDWRITTEN)
    pairs = _propose_all("handwritten prompts", engine, rows)
    layouts = sorted({row["layout"] for row in rows})
    figures: list[Figure] = []
    for name, target in (("all", 0.9), *((layout, None) for layout in layouts)):
        selected = [(row, got) for row, got in pairs if name in ("all", row["layout"])]
        tickers = [row["ticker"] == got["ticker"] for row, got in selected]
        sides = [row["side"] == got.get("side") for row, got in selected if row["side"]]
        figures.append(_share(f"handwritten, {name}: ticker copied", tickers, target))
        figures.append(_share(f"handwritten, {name}: side right", sides, target))
    return figures


def _scores(engine: Engine, prompts: Prompts) -> list[Figure]:
    rows = _rows(SCORES)
    ratios: list[float] = []
    scores: list[float] = []
    for row in rows:
        proposal = row["proposal"]
        stop, target = proposal["new_stop_pct"], proposal["new_target_pct"]
        if not (stop and target):
            continue
        messages = hermes_plugin.score_messages(proposal, row["prompt"], prompts)
        found = engine.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
        ratios.append(target / stop)
        scores.append(hermes_plugin.expected_score(found))
    correlation = rank_correlation(ratios, scores)
    return [
        Figure("score against reward to risk: rank correlation", correlation, len(scores), 0.9),
        _critiques(engine, rows[:CRITICISED], prompts),
    ]


def _critiques(engine: Engine, rows: Sequence[Row], prompts: Prompts) -> Figure:
    """How often the first sentence has the right distances and the right word for their ratio."""
    right = []
    for row in rows:
        messages = hermes_plugin.build_messages(
            prompts.critique_task, row["proposal"], row["prompt"], prompts.system
        )
        text = "".join(delta.text for delta in engine.stream(GenerationRequest(messages, 100)))
        right.append(text.startswith(row["critique"]))
    return _share("critique: first sentence right", right)


def _numbers_from_prompt(pairs: Sequence[tuple[Row, Row]]) -> list[bool]:
    """For each rationale with numbers, whether the prompt has all of them."""
    return [
        numbers(got["rationale"]) <= numbers(row["prompt"])
        for row, got in pairs
        if numbers(got["rationale"])
    ]


def _has_side(row: Row) -> bool:
    return "side" in row["proposal"]


def _same(row: Row, got: Row, field: str) -> bool:
    return bool(row["proposal"].get(field) == got.get(field))


def _share(
    name: str, hits: list[bool], target: float | None = None, *, optional: bool = False
) -> Figure:
    return Figure(name, sum(hits) / len(hits), len(hits), target, optional)


def _propose_all(
    name: str,
    engine: Engine,
    rows: Sequence[Row],
    examples: Iterable[Sequence[Example]] = itertools.repeat(()),
) -> list[tuple[Row, Row]]:
    """Each row with the model's proposal for its prompt; reports progress on a terminal."""
    pairs = []
    for number, (row, shown) in enumerate(zip(rows, examples, strict=False), 1):
        pairs.append((row, propose(engine, row["prompt"], shown)))
        if sys.stderr.isatty() and number % 20 == 0:
            sys.stderr.write(f"\r{name}: {number} of {len(rows)}")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return pairs
