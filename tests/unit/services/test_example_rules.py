"""Which corrections can be few-shot examples, how many fit, and in which order."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from llm_sidecar.db import Correction
from llm_sidecar.proposals import Example
from llm_sidecar.services import example_rules
from llm_sidecar.services.example_rules import (
    Outcome,
    proposal_refusal,
    refusal,
    select,
    token_bound,
)

GOOD: Final[dict[str, Any]] = {
    "ticker": "ABC",
    "action": "pass",
    "confidence": 0.7,
    "rationale": "The trend needs room.",
}
SIZE: Final = len(json.dumps(GOOD, separators=(",", ":")))
"""Characters of it as compact JSON."""
AROUND: Final = 32
"""Tokens of a chat template around an example's two turns."""
PLENTY: Final = 100_000
"""A context that holds everything."""


def correction(prompt: str = "Long ABC", number: int = 0, **changes: Any) -> Correction:
    return Correction(prompt, GOOD | changes, f"t-{number}", f"f-{number}")


def of_tokens(count: int, number: int = 0) -> Correction:
    """An example with this token bound."""
    return correction("p" * (count - SIZE - AROUND), number)


def rationale(characters: int) -> str:
    """Makes a proposal of this many characters as compact JSON."""
    return "x" * (characters - SIZE + len(GOOD["rationale"]))


def test_the_bounds_are_the_documented_ones() -> None:
    bounds: list[float] = [
        example_rules.EXAMPLE_PROMPT_CHARS,
        example_rules.MAX_PROPOSAL_CHARS,
        example_rules.MAX_TOKENS,
        example_rules.CONTEXT_SHARE,
    ]
    assert bounds == [2000, 500, 3000, 0.5]


def test_the_token_bound_counts_bytes_and_what_is_around_each_turn() -> None:
    assert token_bound(correction("")) == SIZE + AROUND
    assert token_bound(Example("p" * 10, GOOD)) == SIZE + AROUND + 10
    assert token_bound(correction("価")) == SIZE + AROUND + 3


@pytest.mark.parametrize(
    ("example", "outcome"),
    [
        (correction(), None),
        (correction(""), None),
        (correction("p" * 2000), None),
        (correction("p" * 2001), Outcome.PROMPT_TOO_LONG),
        (correction("a\x00b"), Outcome.PROMPT_NOT_TEXT),
        (correction("a\x00b" * 1000), Outcome.PROMPT_NOT_TEXT),
        (correction(rationale=rationale(500)), None),
        (correction(rationale=rationale(501)), Outcome.PROPOSAL_TOO_LONG),
        # In JSON, a non-ASCII character takes six characters.
        (correction(rationale="価" * 67), None),
        (correction(rationale="価" * 90), Outcome.PROPOSAL_TOO_LONG),
        # A character may take as many tokens as it has bytes.
        (correction("価" * 900), None),
        (correction("価" * 990), Outcome.TOO_MANY_TOKENS),
        (correction("🚀" * 740), Outcome.TOO_MANY_TOKENS),
        (correction(action="hold"), Outcome.INVALID),
        (correction(extra=1), Outcome.INVALID),
        (correction(confidence=float("nan")), Outcome.INVALID),
        # What is wrong with the proposal comes first.
        (correction("p" * 2001, action="hold"), Outcome.INVALID),
    ],
)
def test_an_example_is_bounded_in_characters_and_tokens(
    example: Correction, outcome: Outcome | None
) -> None:
    assert refusal(example, PLENTY) is outcome


def test_a_proposal_alone_is_refused_for_what_is_wrong_with_it() -> None:
    assert proposal_refusal(GOOD) is None
    assert proposal_refusal(GOOD | {"action": "hold"}) is Outcome.INVALID
    assert proposal_refusal(GOOD | {"rationale": rationale(500)}) is None
    too_long = GOOD | {"rationale": rationale(501)}
    assert proposal_refusal(too_long) is Outcome.PROPOSAL_TOO_LONG


def test_three_thousand_tokens_are_the_most() -> None:
    prompt = "価" * ((3000 - SIZE - AROUND) // 3)
    prompt += "p" * (3000 - token_bound(correction(prompt)))
    assert token_bound(correction(prompt)) == 3000
    assert refusal(correction(prompt), PLENTY) is None
    assert refusal(correction(prompt + "p"), PLENTY) is Outcome.TOO_MANY_TOKENS


def test_an_example_takes_at_most_half_of_the_context() -> None:
    assert refusal(of_tokens(1000), 2000) is None
    assert refusal(of_tokens(1000), 1999) is Outcome.TOO_MANY_TOKENS


def selected(newest_first: list[Correction], count: int, context_length: int) -> list[str]:
    return [used.feedback_id for used in select(newest_first, count, context_length)]


def test_the_newest_come_oldest_first() -> None:
    newest_first = [correction(number=number) for number in (4, 3, 2, 1)]
    assert select(newest_first, 3, PLENTY) == tuple(reversed(newest_first[:3]))
    assert selected(newest_first, 3, PLENTY) == ["f-2", "f-3", "f-4"]
    assert selected(newest_first, 0, PLENTY) == []
    assert selected(newest_first, 9, PLENTY) == ["f-1", "f-2", "f-3", "f-4"]


@pytest.mark.parametrize(
    ("context_length", "expected"),
    [
        (3000, ["f-1", "f-2", "f-3"]),
        (2999, ["f-2", "f-3"]),
        (2000, ["f-2", "f-3"]),
        (1999, ["f-3"]),
        (999, []),
    ],
)
def test_the_oldest_give_way_where_all_take_more_than_half_of_the_context(
    context_length: int, expected: list[str]
) -> None:
    newest_first = [of_tokens(500, number) for number in (3, 2, 1)]
    assert selected(newest_first, 3, context_length) == expected


def test_a_small_example_older_than_one_that_does_not_fit_is_left_out_too() -> None:
    # Otherwise an old correction would outlive a newer one.
    newest_first = [of_tokens(500, 3), of_tokens(900, 2), of_tokens(200, 1)]
    assert selected(newest_first, 3, 2000) == ["f-3"]
