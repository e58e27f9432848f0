"""The demo models that are shipped, and their evaluation."""

from __future__ import annotations

import json
import sys
from random import Random

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.demo import __main__ as command_line
from llm_sidecar.demo import evaluate
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.models.files import DEMO_DIR
from llm_sidecar.models.prompts import read_prompts
from tests.demo_cases import cases
from training.demo_models import market
from training.demo_models.situations import answer


def test_rank_correlation_is_spearmans() -> None:
    assert evaluate.rank_correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1.0)
    assert evaluate.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Worked by hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    assert evaluate.rank_correlation([1, 5, 5, 9], [2, 6, 4, 8]) == pytest.approx(0.9486833)


def test_a_figure_is_met_if_it_reaches_its_target_or_has_none() -> None:
    assert evaluate.Figure("x", 0.99, 10, 0.99).met
    assert not evaluate.Figure("x", 0.98, 10, 0.99).met
    assert evaluate.Figure("x", 0.0, 10).met


@pytest.mark.parametrize(("optional", "status"), [(True, 0), (False, 1)])
def test_a_missed_target_is_printed_and_fails_unless_it_is_optional(
    optional: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = [
        evaluate.Figure("met", 0.99, 500, 0.99),
        evaluate.Figure("missed", 0.966, 500, 0.98, optional=optional),
    ]
    monkeypatch.setattr(command_line, "evaluate", lambda folder: figures)
    monkeypatch.setattr(sys, "argv", ["demo", "evaluate"])
    assert command_line.main() == status
    met, missed = capsys.readouterr().out.splitlines()
    assert met.split() == ["met", "99.0%", "of", "500", "at", "least", "99.0%"]
    assert missed.split() == ["missed", "96.6%", "of", "500", "at", "least", "98.0%", "MISSED"]


def test_the_handwritten_prompts_hold_what_they_claim() -> None:
    rows = [json.loads(line) for line in evaluate.HANDWRITTEN.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 200
    for row in rows:
        assert row["ticker"] in row["prompt"]
        assert row["side"] in ("LONG", "SHORT", None)


def test_the_handwritten_corrections_are_proposals_as_the_server_shows_them() -> None:
    rows = [json.loads(line) for line in evaluate.CORRECTIONS.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 40
    for row in rows:
        correction = row["corrected_proposal"]
        proposals.Proposal.model_validate(correction)
        assert list(correction) == list(proposals.in_order(correction))
        assert correction["ticker"] in row["prompt"]


def test_numbers_are_compared_by_their_value() -> None:
    assert evaluate.numbers("191.10, 1,200 at 3.4 % and .5") == evaluate.numbers(
        "191.1 1200.0 3.40% 0.5"
    )
    assert evaluate.numbers("58.39") != evaluate.numbers("58.3")
    assert evaluate.numbers("no number") == set()


@pytest.fixture(scope="module")
def phi3() -> Engine:
    return load_engine(DEMO_DIR / "phi3", device="cpu")


def test_the_shipped_models_are_small() -> None:
    files = [path for name in ("phi3", "hermes") for path in (DEMO_DIR / name).rglob("*")]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_the_shipped_model_copies_unseen_tickers_and_tells_sides(phi3: Engine) -> None:
    rng = Random(9)
    drawn = [market.draw(rng, "held-out") for _ in range(100)]
    written = [evaluate.propose(phi3, case.prompt) for case in drawn]
    pairs = [(case.proposal, got) for case, got in zip(drawn, written, strict=True)]
    assert sum(right["ticker"] == got["ticker"] for right, got in pairs) >= 97
    assert sum(right.get("side") == got.get("side") for right, got in pairs) >= 95


def test_the_shipped_model_answers_the_prompt_and_not_an_example(phi3: Engine) -> None:
    examples = [proposals.Example(case.prompt, case.proposal) for case in cases(2)]
    request = GenerationRequest(
        proposals.build_messages("Long QZX from 100, RSI 81, overbought.", examples),
        proposals.MAX_COMPLETION_TOKENS,
        proposals.GUIDANCE,
    )
    text = "".join(delta.text for delta in phi3.stream(request))
    assert proposals.parse(text)["ticker"] == "QZX"


def test_the_shipped_hermes_prefers_more_reward_for_the_risk() -> None:
    hermes = load_engine(DEMO_DIR / "hermes", device="cpu")
    prompts = read_prompts(DEMO_DIR / "hermes")
    assert prompts is not None
    scores = []
    for target in (1.0, 2.0, 4.0, 8.0):
        proposal = answer("winner", "ABC", "LONG", None, None)
        proposal |= {"new_stop_pct": 2.0, "new_target_pct": target}
        messages = hermes_plugin.score_messages(proposal, None, prompts)
        found = hermes.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
        assert sum(found.values()) > 0.9
        scores.append(hermes_plugin.expected_score(found))
    assert scores == sorted(scores)
