"""Log probabilities: exact values, the most likely tokens and their order, and the bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.engines.logprobs import (
    check_prompt_logprobs,
    log_softmax,
    most_likely,
    token_logprob,
)
from llm_sidecar.errors import InvalidRequest

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def data(token: int) -> bytes:
    return b"%d" % token


def test_the_log_probability_is_that_of_the_softmax() -> None:
    found = token_logprob(2, LOGITS, 0, data)
    assert found == TokenLogprob(2, b"2", found.logprob)
    assert found.logprob == pytest.approx(math.log(0.2), abs=1e-7)


def test_the_most_likely_tokens_come_with_it_in_order() -> None:
    found = token_logprob(0, LOGITS, 3, data)
    assert [(one.id, one.data) for one in found.top] == [(1, b"1"), (3, b"3"), (2, b"2")]
    likely = [math.log(share) for share in (0.4, 0.3, 0.2)]
    assert [one.logprob for one in found.top] == pytest.approx(likely, abs=1e-7)
    assert all(one.top == () for one in found.top)


def test_logits_far_apart_keep_their_difference() -> None:
    found = log_softmax(np.array([0.0, -800.0, 700.0], np.float32))
    assert found.tolist() == [-700.0, -1500.0, 0.0]


@pytest.mark.parametrize("logit", [-np.inf, -1e30])
def test_an_impossible_token_has_a_finite_log_probability(logit: float) -> None:
    assert token_logprob(1, np.array([0.0, logit], np.float32), 0, data).logprob == -9999.0


def test_of_equal_tokens_the_lower_id_comes_first_as_in_greedy_sampling() -> None:
    logits = np.array([1, 3, 2, 3, 2, 2], np.float32)
    assert most_likely(logits, 4) == [1, 3, 2, 4]
    assert most_likely(logits, 1) == [int(logits.argmax())]


@pytest.mark.parametrize(("count", "found"), [(0, []), (4, [1, 3, 2, 0]), (20, [1, 3, 2, 0])])
def test_there_are_no_more_tokens_than_the_vocabulary_has(count: int, found: list[int]) -> None:
    assert most_likely(LOGITS, count) == found


def test_a_prompt_has_a_bound_of_log_probabilities() -> None:
    check_prompt_logprobs(1 << 17, 0)
    check_prompt_logprobs(1 << 16, 1)
    message = r"^logprobs: 1 for each of 65537 prompt tokens are too many; ask for fewer or shorten"
    with pytest.raises(InvalidRequest, match=message):
        check_prompt_logprobs((1 << 16) + 1, 1)
