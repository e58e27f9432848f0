"""Which tables a filter applies to, and which rows match."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.db.filters import Filters
from llm_sidecar.db.rows import FEEDBACK, PROPOSALS, RUNS, SCORES, WITHDRAWALS

WITH_PROPOSALS = (RUNS, FEEDBACK, PROPOSALS)
PROPOSAL = {"ticker": "ABC", "action": "pass", "nested": {"ticker": "XYZ"}}
ROWS: dict[str, dict[str, Any]] = {
    RUNS: {
        "final_output": json.dumps({"proposal": PROPOSAL, "score": 0.5, "ticker": "XYZ"}),
        "status": "success",
    },
    FEEDBACK: {"corrected_proposal": json.dumps(PROPOSAL)},
    PROPOSALS: {"proposal": json.dumps(PROPOSAL), "score": 0.5, "model": "phi3/demo"},
    SCORES: {"score": 0.5},
}


@pytest.mark.parametrize(
    ("filters", "tables"),
    [
        (Filters(status="error"), (RUNS,)),
        (Filters(ticker="ABC"), WITH_PROPOSALS),
        (Filters(action="pass"), WITH_PROPOSALS),
        (Filters(model="phi3/demo"), (PROPOSALS,)),
        (Filters(min_score=0.0), (RUNS, SCORES, PROPOSALS)),
    ],
)
def test_a_filter_applies_to_some_tables(filters: Filters, tables: tuple[str, ...]) -> None:
    (name,) = filters.names()
    for table in (RUNS, FEEDBACK, PROPOSALS, SCORES, WITHDRAWALS):
        assert filters.misplaced(table) == (None if table in tables else (name, tables))


def test_filters_are_unset_by_default() -> None:
    assert Filters().names() == []
    assert Filters("", "", "", "", 0.0).names() == [
        "status",
        "ticker",
        "action",
        "model",
        "min_score",
    ]


@pytest.mark.parametrize("table", WITH_PROPOSALS)
@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (Filters(), True),
        (Filters(ticker="ABC"), True),
        (Filters(ticker="abc"), False),
        (Filters(ticker="XYZ"), False),
        (Filters(action="pass"), True),
        (Filters(action="adjust"), False),
        (Filters(ticker="ABC", action="pass"), True),
        (Filters(ticker="ABC", action="adjust"), False),
        (Filters(ticker="XYZ", action="pass"), False),
    ],
)
def test_ticker_and_action_are_compared_with_the_proposal(
    table: str, filters: Filters, found: bool
) -> None:
    assert filters.matches(table, ROWS[table]) is found


@pytest.mark.parametrize("table", [RUNS, SCORES, PROPOSALS])
@pytest.mark.parametrize(("least", "found"), [(0.0, True), (0.5, True), (0.50001, False)])
def test_a_score_matches_a_minimum_that_it_equals(table: str, least: float, found: bool) -> None:
    assert Filters(min_score=least).matches(table, ROWS[table]) is found


def test_a_row_without_a_score_matches_no_minimum() -> None:
    row = ROWS[PROPOSALS] | {"score": None}
    assert not Filters(min_score=0.0).matches(PROPOSALS, row)
    assert Filters(ticker="ABC").matches(PROPOSALS, row)
    for output in ("", '{"score": null}', '{"score": true}', '{"score": "1"}', "{}"):
        assert not Filters(min_score=0.0).matches(RUNS, {"final_output": output})
    assert Filters(min_score=1.0).matches(RUNS, {"final_output": '{"score": 1}'})


@pytest.mark.parametrize(
    "output", ["", "words", "[]", '"ABC"', "{}", '{"proposal": "ABC"}', '{"proposal": ["ABC"]}']
)
def test_an_output_without_a_proposal_matches_no_ticker(output: str) -> None:
    assert not Filters(ticker="ABC").matches(RUNS, {"final_output": output})


def test_feedback_without_a_correction_matches_no_action() -> None:
    assert not Filters(action="pass").matches(FEEDBACK, {"corrected_proposal": None})


def test_status_and_model_are_compared_exactly() -> None:
    assert Filters(status="success").matches(RUNS, ROWS[RUNS])
    assert not Filters(status="succes").matches(RUNS, ROWS[RUNS])
    assert Filters(model="phi3/demo").matches(PROPOSALS, ROWS[PROPOSALS])
    assert not Filters(model="phi3").matches(PROPOSALS, ROWS[PROPOSALS])
    assert not Filters(model="phi3/demo", ticker="X").matches(PROPOSALS, ROWS[PROPOSALS])
