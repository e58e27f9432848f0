"""The cases of the evaluation, compared with what the generator draws."""

from __future__ import annotations

from pathlib import Path

from llm_sidecar.demo import evaluate
from training.demo_models import held_out
from training.demo_models.tickers import split_of


def test_the_shipped_cases_are_those_that_the_generator_draws(tmp_path: Path) -> None:
    held_out.write(tmp_path)
    for file in (evaluate.PROPOSALS, evaluate.SCORES):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_no_case_names_a_ticker_of_training() -> None:
    proposals = [row["proposal"] for row in held_out.proposal_rows() + held_out.score_rows()]
    assert len(proposals) == 746
    assert {split_of(proposal["ticker"]) for proposal in proposals} == {"held-out"}


def test_each_prompt_has_examples_of_other_tickers() -> None:
    corrections = held_out.corrections()
    for row in held_out.proposal_rows():
        assert [len(row["examples"][count]) for count in ("1", "3")] == [1, 3]
        for example in row["examples"]["1"] + row["examples"]["3"]:
            shown = corrections[example] if isinstance(example, int) else example["proposal"]
            assert shown["ticker"] != row["proposal"]["ticker"]
