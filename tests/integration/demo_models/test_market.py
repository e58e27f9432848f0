"""The synthetic market: prompts, and the proposals that its rule gives."""

from __future__ import annotations

from random import Random

import llguidance

from llm_sidecar import proposals
from tests.demo_cases import cases
from training.demo_models.situations import SITUATIONS, answer
from training.demo_models.tickers import random_ticker, split_of


def test_every_answer_can_be_written_under_guidance() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(proposals.GUIDANCE)
    for case in cases(300):
        proposals.Proposal.model_validate(case.proposal)
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        tokens = tokenizer.tokenize_str(proposals.dumps(case.proposal))
        assert matcher.try_consume_tokens(tokens) == len(tokens), case
        assert matcher.is_accepting(), case


def test_every_prompt_names_its_ticker_and_every_rationale_its_situation() -> None:
    for case in cases(500):
        assert case.proposal["ticker"] in case.prompt
        assert SITUATIONS[case.situation].keyword in case.proposal["rationale"].lower()


def test_training_never_sees_a_held_out_ticker() -> None:
    rng = Random(2)
    assert all(split_of(random_ticker(rng, "train")) == "train" for _ in range(300))
    assert all(split_of(random_ticker(rng, "held-out")) == "held-out" for _ in range(300))
    assert all(split_of(case.proposal["ticker"]) == "train" for case in cases(300))


def test_the_same_seed_gives_the_same_market() -> None:
    assert cases(50) == cases(50)
    assert cases(50) != cases(50, seed=2)


def test_prompts_hardly_repeat() -> None:
    assert len({case.prompt for case in cases(1000)}) > 995


def test_a_side_is_hurt_by_what_helps_the_other() -> None:
    long = answer("broke_support", "ABC", "LONG", "12.5", None)
    short = answer("broke_support", "ABC", "SHORT", "12.5", None)
    assert (long["action"], short["action"]) == ("abort", "adjust")
    assert "12.5" in long["rationale"]
    assert "side" not in answer("broke_support", "ABC", None, None, None)


def test_a_wild_market_widens_and_a_calm_one_tightens() -> None:
    stops = [answer("winner", "ABC", "LONG", None, atr)["new_stop_pct"] for atr in ("1", "2", "4")]
    assert stops == sorted(stops)
    assert len(set(stops)) == 3
