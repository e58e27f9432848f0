"""Hermes' scores, answers and texts on a real language model, SmolLM2-135M-Instruct.

The measure of repetition is seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319, section 6): the share
of the groups of four words in a text that have occurred before in it. A text loops if that is at
least a half, or if it ends with the same words three times in a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import result_of
from llm_sidecar.sentences import sentence_end
from llm_sidecar.services import decisions
from llm_sidecar.services.decisions import Input, Option
from tests.batches import hundred_proposals, texts_of
from tests.real_transformers import smollm2_folder

PAIRS: Final = Path(__file__).resolve().parents[1] / "judged_pairs.jsonl"
"""Market contexts, each with a good and a bad proposal, written by hand."""
CRITIQUE_TOKENS: Final = 96
TEXT_TOKENS: Final = 160
QUESTIONS: Final = (
    *("What is a stop loss?", "Explain reward to risk.", "Should I hold NVDA over earnings?"),
    *("Write a short note about oil.", "What moves gold?", "How do I size a position?"),
    *("List three risks of a short position.", "What is RSI?", "What is a gap?"),
    *("Summarise today's market for a trader.", "Why do banks fall when rates fall?"),
    *("Tell me about volatility.", "When should a trader close a position?"),
    *("Compare a tight stop with a wide one.", "What does overbought mean?"),
    *("Explain support and resistance.", "Is a dividend good for a stock?"),
    *("What is a short squeeze?", "How does inflation affect shares?", "What is liquidity?"),
    *("Give advice to a new trader.", "What is a trailing stop?", "What does volume say?"),
    *("How do traders use averages?", "We are long NVDA, earnings in 2 days."),
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(smollm2_folder(), device="cpu", threads=2)


def pairs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAIRS.read_text().splitlines()]


def test_scores_have_enough_answer_mass_and_rank_good_above_bad(engine: Engine) -> None:
    masses, right = [], 0
    for pair in pairs():
        scores = []
        for proposal in (pair["good"], pair["bad"]):
            chat = hermes_plugin.score_messages(proposal, pair["context"])
            found = engine.score_choices(chat, hermes_plugin.SCORE_ANSWERS)
            masses.append(sum(found.values()))
            scores.append(hermes_plugin.expected_score(found))
        right += scores[0] > scores[1]
    print(f"answer mass {min(masses):.2f} to {max(masses):.2f}, {right} of {len(pairs())} right")
    assert min(masses) > 0.5
    # 17 were measured; half would be chance.
    assert right >= 14


def test_a_hundred_proposals_are_valid(engine: Engine) -> None:
    assert len(hundred_proposals(engine)) == 100


def test_questions_have_enough_answer_mass(engine: Engine) -> None:
    levels = tuple(map(Option, ("very small", "small", "medium", "large", "very large")))
    options = tuple(map(Option, ('"adjust"', '"pass"', '"abort"')))
    questions = [
        decisions.Question("predicate", "The position is long."),
        decisions.Question("choice", "What should the trader do?", options),
        decisions.Question("score", "How large is the risk?", levels),
    ]
    masses = [
        score.mass
        for pair in pairs()[:8]
        for score in result_of(
            engine.score_questions(
                [decisions.chat_question(Input(pair["context"]), each) for each in questions]
            )
        )
    ]
    print(f"answer mass {min(masses):.2f} to {max(masses):.2f}")
    assert min(masses) > 0.5


def test_no_text_repeats_itself_without_end(engine: Engine) -> None:
    critiques = [
        GenerationRequest(
            hermes_plugin.build_messages(
                hermes_plugin.CRITIQUE_TASK, pair["good"], pair["context"]
            ),
            CRITIQUE_TOKENS,
            temperature=None,
        )
        for pair in pairs()
    ]
    chats = [
        GenerationRequest(hermes_plugin.chat_messages(question), TEXT_TOKENS, temperature=None)
        for question in QUESTIONS
    ]
    texts = [three_sentences(text) for text in texts_of(engine, critiques)]
    texts += texts_of(engine, chats)
    assert len(texts) == 50
    repeated = [repetition(text.split()) for text in texts]
    print(f"seq-rep-4: {sum(repeated) / 50:.2f} on average, at most {max(repeated):.2f}")
    looping = [
        text for text, share in zip(texts, repeated, strict=True) if share >= 0.5 or loops(text)
    ]
    assert looping == []


def three_sentences(text: str) -> str:
    end = 0
    for _ in range(3):
        end = sentence_end(text, end, complete=True) or end
    return text[:end] or text


def repetition(words: Sequence[str]) -> float:
    """The share of the groups of four words that have occurred before."""
    groups = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def loops(text: str) -> bool:
    """Whether a text ends with the same words, at least four, three times in a row."""
    words = text.split()
    return any(
        words[-size:] == words[-2 * size : -size] == words[-3 * size : -2 * size]
        for size in range(4, len(words) // 3 + 1)
    )
