"""The forward passes that several questions need, and the scores from their logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from llm_sidecar.engines.base import ChoiceScores, Question, result_of
from llm_sidecar.engines.choice_tree import ChoiceTree
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.questions import Asked, Batches, Found, Read, plan_batches, scores_of

SHARED = list(range(100, 140))


def read(*end: int, path: Sequence[int] = ()) -> Read:
    return Read([*SHARED, *end], tuple(path))


def plan(*reads: Read, rows: int = 8, context: int = 1000) -> Batches | None:
    return plan_batches(reads, rows, context)


def logits(*probabilities: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.log(np.array(probabilities, dtype=np.float32))


def test_a_question_reserves_capacity_for_an_answer() -> None:
    messages = [{"role": "user", "content": "Hi."}]
    request = Question(messages, ("0", "1"), [7]).request
    assert (request.messages, request.max_tokens, request.tokens) == (messages, 4, [7])
    assert Question(messages, ("0",)).request.tokens is None


def test_a_question_needs_a_pass_for_each_path_after_what_stays_of_its_prompt() -> None:
    tree = ChoiceTree([7, 8], {"1": [7, 1], "10": [7, 1, 0], "20": [7, 2, 0]})
    assert Asked([6, 7, 8], tree).reads() == [Read([6, 7], (1,)), Read([6, 7], (2,))]


def test_reads_share_what_all_prompts_begin_with() -> None:
    assert plan(read(1, 2, 3), read(1, 4, 5), read(1, 2, 6, 7, path=[8])) == Batches(
        [*SHARED, 1], len(SHARED) + 5, 3
    )


def test_the_last_two_tokens_of_a_prompt_are_never_shared() -> None:
    assert plan(read(1, 2, 3), read(1, 2, 3, 4)) == Batches([*SHARED, 1], len(SHARED) + 4, 2)
    assert plan(read(1, 2, path=[3]), read(1, 2, path=[4])) == Batches(SHARED, len(SHARED) + 3, 2)


@pytest.mark.parametrize(("length", "rows"), [(2, 8), (32, 8), (33, 7), (128, 2), (129, None)])
def test_a_pass_has_at_most_as_many_tokens_as_a_step_of_a_prefill(
    length: int, rows: int | None
) -> None:
    found = plan(*(read(*range(number, number + length)) for number in range(9)), context=10_000)
    assert (found and found.rows) == rows
    assert PREFILL_CHUNK == 256


@pytest.mark.parametrize(("context", "rows"), [(168, 8), (167, 7), (42, 2), (41, None)])
def test_all_rows_fit_into_two_contexts(context: int, rows: int | None) -> None:
    found = plan(*(read(number, number) for number in range(9)), context=context)
    assert (found and found.rows) == rows


def test_prompts_that_begin_differently_are_computed_one_after_the_other() -> None:
    assert plan(Read([1, 2, 3, 4], ()), Read([5, 2, 3, 4], ())) is None
    assert plan(Read([1, 2, 3, 4], ()), Read([1, 2, 5, 4], ())) is None
    assert plan(read(1, 2)) is None
    assert plan(read(1, 2), read(3, 4), rows=1) is None


def test_scores_come_from_the_logits_of_their_own_question() -> None:
    first = Asked([7, 7], ChoiceTree([7], {"0": [7, 0], "1": [7, 1]}))
    second = Asked([7, 7, 7], ChoiceTree([7], {"10": [7, 1, 0], "20": [7, 2, 0]}))
    assert second.tree.paths == [(1,), (2,)]

    def results() -> Iterator[Found | None]:
        yield None
        yield Found(np.array([logits(0.25, 0.5, 0.25)]), 5)
        yield Found(np.array([logits(0.25, 0.5, 0.25), logits(0.5, 0.25, 0.25)]), 6)
        yield None
        yield Found(np.array([logits(0.25, 0.5, 0.25), logits(0.125, 0.5, 0.375)]), 1)

    steps = scores_of([first, second], results())
    # One for each None, and one between the questions.
    assert [next(steps) for _ in range(3)] == [None] * 3
    one, other = result_of(steps)
    assert one.probabilities == pytest.approx({"0": 0.25, "1": 0.5})
    assert (one.prompt_tokens, one.cached_tokens) == (2, 5)
    assert other.probabilities == pytest.approx({"10": 0.25, "20": 0.03125})
    assert (other.prompt_tokens, other.cached_tokens) == (3, 6)


def test_the_mass_is_the_sum_of_the_probabilities() -> None:
    assert ChoiceScores({"0": 0.25, "1": 0.5}).mass == 0.75
