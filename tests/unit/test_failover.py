"""Which requests another replica repeats, and which text is given out once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import GenerationRequest
from llm_sidecar.models.failover import Failover

GREEDY = GenerationRequest([{"role": "user", "content": "What now?"}], 5)
LOST = ModelUnavailable("The phi3 worker ended; try again.", retry_after=1)


def text_of(failover: Failover, *texts: str) -> list[str]:
    """What of each text is new."""
    return [failover.new_text(text, None) for text in texts]


def test_all_text_of_the_first_replica_is_new() -> None:
    failover = Failover(GREEDY)
    assert text_of(failover, "a", "", "bc") == ["a", "", "bc"]
    assert not failover.repeats_text


@pytest.mark.parametrize(
    ("given", "again", "new"),
    [
        (["abc"], ["a", "b", "cd", "e"], ["", "", "d", "e"]),
        (["a", "bc"], ["abcd", "e"], ["d", "e"]),
        (["a", "bc"], ["abc", "d"], ["", "d"]),
        ([""], ["a"], ["a"]),
        ([], ["a"], ["a"]),
    ],
)
def test_text_that_was_given_out_is_not_repeated(
    given: list[str], again: list[str], new: list[str]
) -> None:
    failover = Failover(GREEDY)
    text_of(failover, *given)
    failover.lost(LOST)
    assert text_of(failover, *again) == new


def test_the_repetition_catches_up_with_the_text_that_was_given_out() -> None:
    failover = Failover(GREEDY)
    text_of(failover, "abc")
    failover.lost(LOST)
    found = []
    for text in ("a", "b", "c", "d"):
        failover.new_text(text, None)
        found.append(failover.repeats_text)
    assert found == [True, True, False, False]


@pytest.mark.parametrize(("text", "is_last"), [("x", False), ("abx", False), ("ab", True)])
def test_text_that_differs_is_an_error(text: str, is_last: bool) -> None:
    failover = Failover(GREEDY)
    text_of(failover, "abc")
    failover.lost(LOST)
    with pytest.raises(ModelUnavailable, match=r"would continue differently; try again\.$") as it:
        failover.new_text(text, None, is_last=is_last)
    assert it.value.retry_after == 1


def test_the_same_text_may_end_where_it_was_lost() -> None:
    failover = Failover(GREEDY)
    text_of(failover, "abc")
    failover.lost(LOST)
    assert failover.new_text("abc", None, is_last=True) == ""


def test_a_request_is_repeated_once() -> None:
    failover = Failover(GREEDY)
    failover.lost(LOST)
    with pytest.raises(ModelUnavailable) as caught:
        failover.lost(LOST)
    assert caught.value is LOST


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"temperature": None},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"echo": True},
    ],
)
def test_what_cannot_be_repeated_exactly_is_repeated_only_before_anything_is_given_out(
    changes: dict[str, Any],
) -> None:
    request = replace(GREEDY, **changes)
    Failover(request).lost(LOST)
    given = Failover(request)
    # The prompt of an echo, or its log probabilities.
    text_of(given, "")
    with pytest.raises(ModelUnavailable) as caught:
        given.lost(LOST)
    assert caught.value is LOST


@pytest.mark.parametrize("temperature", [0.5, None])
def test_a_seed_makes_a_sampled_text_repeatable(temperature: float | None) -> None:
    failover = Failover(replace(GREEDY, temperature=temperature, seed=7))
    text_of(failover, "ab")
    failover.lost(LOST)
    assert text_of(failover, "abc") == ["c"]


def test_text_is_continued_with_the_same_adapter_only() -> None:
    failover = Failover(GREEDY)
    assert failover.takes("20260101")
    assert failover.takes(None)
    failover.new_text("a", "20260101")
    failover.lost(LOST)
    assert failover.takes("20260101")
    assert not failover.takes(None)
    assert not failover.takes("20260102")


def test_a_request_without_text_so_far_may_get_any_adapter() -> None:
    failover = Failover(GREEDY)
    failover.lost(LOST)
    assert failover.takes("20260102")


def test_scores_are_repeated() -> None:
    failover = Failover()
    failover.lost(LOST)
    assert failover.takes("20260102")
