"""Draws the held-out cases that `llm_sidecar.demo.evaluate` measures the demo models on.

Training never sees them: it draws with other seeds and from other tickers.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Final

from llm_sidecar.demo.evaluate import CORRECTIONS, CRITICISED, EXAMPLE_COUNTS, PROPOSALS, SCORES
from training.demo_models import judgement
from training.demo_models.cases import Case
from training.demo_models.market import draw
from training.demo_models.situations import SITUATIONS

_PROPOSALS, _SCORED = 500, 200
_SEED: Final = 20_260_101


def write(folder: Path) -> None:
    """Writes both files of cases into `folder`, one JSON object a line."""
    for file, rows in ((PROPOSALS, proposal_rows()), (SCORES, score_rows())):
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        (folder / file.name).write_text("".join(f"{line}\n" for line in lines))


def proposal_rows() -> list[dict[str, Any]]:
    """The cases of Phi-3.

    Each has `prompt`, the right `proposal`, a `keyword` that a rationale about its situation
    contains, and `examples`: for each number of few-shot examples, that many.
    """
    rng = Random(_SEED)
    cases = [draw(rng, "held-out") for _ in range(_PROPOSALS)]
    corrected = corrections()
    examples: dict[str, list[list[Any]]] = {}
    for count in EXAMPLE_COUNTS:
        rng = Random(_SEED + count)
        examples[str(count)] = [_examples(rng, case, count, corrected) for case in cases]
    return [
        {
            "prompt": case.prompt,
            "proposal": case.proposal,
            "keyword": SITUATIONS[case.situation].keyword,
            "examples": {count: drawn[index] for count, drawn in examples.items()},
        }
        for index, case in enumerate(cases)
    ]


def corrections() -> list[dict[str, Any]]:
    """The proposals of `CORRECTIONS`, in the order of its lines."""
    return [json.loads(line)["corrected_proposal"] for line in CORRECTIONS.read_text().splitlines()]


def _examples(
    rng: Random, case: Case, count: int, corrected: list[dict[str, Any]]
) -> list[int | dict[str, Any]]:
    """`count` examples of other tickers: about half drawn, half line indexes of `CORRECTIONS`."""
    found: list[int | dict[str, Any]] = []
    while len(found) < count:
        example: int | dict[str, Any]
        if rng.random() < 0.5:
            drawn = draw(rng, "held-out")
            example = {"prompt": drawn.prompt, "proposal": drawn.proposal}
            ticker = drawn.proposal["ticker"]
        else:
            example = rng.randrange(len(corrected))
            ticker = corrected[example]["ticker"]
        if ticker != case.proposal["ticker"]:
            found.append(example)
    return found


def score_rows() -> list[dict[str, Any]]:
    """The cases of Hermes, as many as hold 200 with both distances.

    Each has `prompt` and the `proposal` to judge; the first ones also have `critique`, the right
    first sentence about it.
    """
    rng = Random(_SEED)
    rows: list[dict[str, Any]] = []
    scored = 0
    while scored < _SCORED:
        case = draw(rng, "held-out")
        proposal = judgement.varied(rng, case, fits=True)
        row = {"prompt": case.prompt, "proposal": proposal}
        if len(rows) < CRITICISED:
            row["critique"], _, _ = judgement.critique(proposal, fits=True).partition(". ")
        rows.append(row)
        scored += judgement.reward_to_risk(proposal) is not None
    return rows
