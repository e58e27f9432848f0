"""Which corrections can be few-shot examples, and which of them are."""

from __future__ import annotations

from typing import Any

import pytest

from llm_sidecar.db import Correction
from llm_sidecar.examples import Outcome, choose, proposal_refusal, refusal, token_bound
from llm_sidecar.proposals import Example, dumps

GOOD: dict[str, Any] = {
    "ticker": "ABC",
    "action": "pass",
    "confidence": 0.7,
    "rationale": "",
}
SIZE = 64
"""Characters of it as compact JSON."""
AROUND = 32
"""Tokens of a chat template around an example's two turns."""
AMPLE = 100_000
"""A context that bounds nothing."""


def correction(prompt: str = "Long ABC", number: int = 0, **changes: Any) -> Correction:
    return Correction(prompt, GOOD | {"rationale": "x"} | changes, f"t-{number}", f"f-{number}")


def with_bound(tokens: int, number: int = 0) -> Correction:
    """A correction of so many tokens at most."""
    return correction("p" * (tokens - SIZE - 1 - AROUND), number)


def test_an_example_takes_at_most_a_token_a_byte_and_a_template() -> None:
    assert len(dumps(GOOD)) == SIZE
    assert token_bound(Example("", GOOD)) == SIZE + AROUND
    assert token_bound(correction("ab")) == 2 + SIZE + 1 + AROUND
    # As a prompt a character takes its bytes, in JSON its escape.
    assert token_bound(correction("価")) == 3 + SIZE + 1 + AROUND
    assert token_bound(correction("", rationale="価")) == SIZE + 6 + AROUND


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"rationale": "x" * (500 - SIZE)}, None),
        ({"rationale": "x" * (501 - SIZE)}, Outcome.PROPOSAL_TOO_LONG),
        ({"rationale": "価" * 72}, None),
        ({"rationale": "価" * 73}, Outcome.PROPOSAL_TOO_LONG),
        ({"rationale": "x", "action": "hold"}, Outcome.INVALID),
        ({"rationale": "x", "extra": 1}, Outcome.INVALID),
        ({"rationale": "x", "confidence": float("nan")}, Outcome.INVALID),
        # It is said to be no proposal before it is said to be too long.
        ({"rationale": "x" * 501, "action": "hold"}, Outcome.INVALID),
    ],
)
def test_a_corrected_proposal_has_to_be_valid_and_short(
    changes: dict[str, Any], outcome: Outcome | None
) -> None:
    assert proposal_refusal(GOOD | changes) is outcome
    assert refusal(correction(**changes), AMPLE) is outcome


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        ("p" * 2000, None),
        ("p" * 2001, Outcome.PROMPT_TOO_LONG),
        ("a\tb\r\nc", None),
        ("a\x00b", Outcome.PROMPT_NOT_TEXT),
        ("\x1b" + "p" * 2001, Outcome.PROMPT_NOT_TEXT),
        ("価" * 967, None),
        ("価" * 968, Outcome.TOO_MANY_TOKENS),
        ("🚀" * 726, Outcome.TOO_MANY_TOKENS),
        ("価" * 2001, Outcome.PROMPT_TOO_LONG),
    ],
)
def test_a_prompt_has_to_be_text_and_short(prompt: str, outcome: Outcome | None) -> None:
    assert refusal(correction(prompt), AMPLE) is outcome


def test_an_example_takes_at_most_half_of_the_context() -> None:
    assert refusal(with_bound(1000), 2000) is None
    assert refusal(with_bound(1000), 1999) is Outcome.TOO_MANY_TOKENS
    assert refusal(with_bound(1001), 2001) is Outcome.TOO_MANY_TOKENS


def test_the_newest_are_chosen_and_come_oldest_first() -> None:
    newest_first = [correction(number=number) for number in (4, 3, 2, 1)]
    assert choose(newest_first, 3, AMPLE) == tuple(correction(number=n) for n in (2, 3, 4))
    assert choose(newest_first, 5, AMPLE) == tuple(correction(number=n) for n in (1, 2, 3, 4))
    assert choose(newest_first, 0, AMPLE) == ()
    assert choose([], 3, AMPLE) == ()


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
    newest_first = [with_bound(500, number) for number in (3, 2, 1)]
    chosen = choose(newest_first, 3, context_length)
    assert [example.feedback_id for example in chosen] == expected


def test_one_that_does_not_fit_lets_no_older_one_pass() -> None:
    newest_first = [with_bound(500, 3), with_bound(600, 2), with_bound(400, 1)]
    assert choose(newest_first, 3, 2000) == (with_bound(500, 3),)
