"""The probabilities of answers from the logits after a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from llm_sidecar.engines.choice_tree import ChoiceTree
from llm_sidecar.engines.generation import Logits


def logits(*rows: Sequence[float]) -> Logits:
    """Logits whose softmax these probabilities are."""
    return np.log(np.maximum(np.array(rows, dtype=np.float32), 1e-30))


def test_one_and_ten_share_a_digit() -> None:
    tree = ChoiceTree([7, 8], {"0": [7, 8, 0], "1": [7, 8, 1], "10": [7, 8, 1, 0]})
    assert (tree.replaced, tree.paths) == (0, [(1,)])
    found = tree.read([logits([0.2, 0.6, 0.2], [0.25, 0.5, 0.25])])
    assert found == pytest.approx({"0": 0.2, "1": 0.45, "10": 0.15})


def test_answers_of_one_token_need_no_tokens_after_the_prompt() -> None:
    tree = ChoiceTree([7], {"0": [7, 0], "10": [7, 2]})
    assert (tree.replaced, tree.paths) == (0, [()])
    assert tree.read([logits([0.5, 0.3, 0.2])]) == pytest.approx({"0": 0.5, "10": 0.2})


def test_a_token_that_all_answers_begin_with_counts_too() -> None:
    tree = ChoiceTree([7], {"0": [7, 3, 0], "1": [7, 3, 1], "10": [7, 3, 1, 0]})
    assert (tree.replaced, tree.paths) == (0, [(3, 1)])
    rows = logits([0.1, 0.1, 0.0, 0.8], [0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0])
    assert tree.read([rows]) == pytest.approx({"0": 0.4, "1": 0.1, "10": 0.1})


def test_an_answer_may_take_the_place_of_the_prompts_end() -> None:
    tree = ChoiceTree([7, 5, 6], {"0": [7, 5, 0], "1": [7, 1]})
    assert (tree.replaced, tree.paths) == (2, [(5,)])
    found = tree.read([logits([0.1, 0.4, 0.0, 0.0, 0.0, 0.5], [0.5, 0.5, 0, 0, 0, 0])])
    assert found == pytest.approx({"0": 0.25, "1": 0.4})


def test_answers_that_part_more_than_once_need_a_pass_each() -> None:
    tree = ChoiceTree([7], {"10": [7, 1, 0], "20": [7, 2, 0], "2": [7, 2]})
    assert tree.paths == [(1,), (2,)]
    found = tree.read(
        [
            logits([0.2, 0.3, 0.5], [0.5, 0.5, 0.0]),
            logits([0.2, 0.3, 0.5], [0.1, 0.9, 0.0]),
        ]
    )
    assert found == pytest.approx({"10": 0.15, "20": 0.05, "2": 0.45})


def test_probabilities_of_very_unlikely_answers_are_not_lost() -> None:
    tree = ChoiceTree([7], {"0": [7, 0, 0], "1": [7, 1]})
    rows = np.array([[-200.0, 0.0], [-200.0, 0.0]], dtype=np.float32)
    assert tree.read([rows])["0"] == pytest.approx(math.exp(-400))
