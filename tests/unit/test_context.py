"""The error for a prompt that does not fit the model's context."""

from __future__ import annotations

import pytest

from llm_sidecar.engines.context import check_context
from llm_sidecar.engines.requests import ANSWER_TOKENS
from llm_sidecar.errors import InvalidRequest


@pytest.mark.parametrize(("prompt", "new"), [(96, ANSWER_TOKENS), (50, 50), (99, 1)])
def test_a_prompt_that_fits_is_accepted(prompt: int, new: int) -> None:
    check_context(prompt, new, 100)


@pytest.mark.parametrize(("prompt", "new"), [(99, ANSWER_TOKENS), (99, 50), (100, 1)])
def test_a_prompt_that_no_max_length_makes_fit_is_to_be_shortened(prompt: int, new: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_context(prompt, new, 100)
    assert caught.value.detail == (
        f"prompt: it takes {prompt} tokens, which is too many for the model's context of 100; "
        "shorten it"
    )


@pytest.mark.parametrize(("prompt", "new"), [(96, 5), (1, 100)])
def test_where_a_shorter_answer_helps_the_error_says_so(prompt: int, new: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_context(prompt, new, 100)
    assert caught.value.detail == (
        f"prompt: it takes {prompt} tokens, which with the tokens of the answer is more than the "
        "model's context of 100; shorten it, or ask for a shorter answer"
    )
