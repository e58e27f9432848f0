"""Typed questions: the chats that ask them, and the answers from the probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, NotFound, QueueFull
from llm_sidecar.models.base import Adapter, ChoiceScores
from llm_sidecar.services.decisions import (
    ANSWER_START,
    SYSTEM_PROMPT,
    TASKS,
    Answer,
    Input,
    Option,
    Question,
)
from tests.unit.fakes import FakeSidecar

PREDICATE = Question("predicate", "The position is overbought.")
CHOICE = Question("choice", "What to do?", (Option('"adjust"', "Move the stop."), Option('"pass"')))
SCORE = Question("score", "How good is it?", tuple(map(Option, ("Poor", "Fair", "Good"))))
GIVEN = Input("Long ABC, RSI 81.")


def test_a_predicate_is_true_or_false() -> None:
    assert PREDICATE.answers == ("True", "False")
    assert PREDICATE.text() == f"Question: The position is overbought.\n{TASKS['predicate']}"


def test_the_options_of_a_choice_are_numbered_from_one() -> None:
    assert CHOICE.answers == ("1", "2")
    assert CHOICE.text() == (
        f'Question: What to do?\n1: "adjust" - Move the stop.\n2: "pass"\n{TASKS["choice"]}'
    )


def test_the_levels_of_a_score_are_numbered_from_zero() -> None:
    assert SCORE.answers == ("0", "1", "2")
    assert SCORE.text() == (
        f"Question: How good is it?\n0: Poor\n1: Fair\n2: Good\n{TASKS['score']}"
    )


def test_the_largest_questions_have_an_answer_for_each_option() -> None:
    many = Question("choice", "Which?", tuple(map(Option, map(str, range(255)))))
    assert (len(many.answers), many.answers[-1]) == (255, "255")
    assert Question("score", "How?", tuple(map(Option, "abcdefghij"))).answers[-1] == "9"


# Answers


@pytest.mark.parametrize(
    ("probabilities", "confidence"),
    [
        ((1.0, 0.0), 1.0),
        ((0.5, 0.5), 0.0),
        ((0.25, 0.25, 0.25, 0.25), 0.0),
        ((0.5, 0.5, 0.0, 0.0), 0.5),
        ((0.9, 0.1), 1 + (0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))),
    ],
)
def test_confidence_says_how_concentrated_the_probabilities_are(
    probabilities: tuple[float, ...], confidence: float
) -> None:
    answer = Answer(probabilities, 1.0, is_reliable=True)
    assert answer.confidence == pytest.approx(confidence, abs=1e-12)


def test_confidence_stays_in_its_range_after_rounding() -> None:
    third = 1 / 3
    assert Answer((third, third, third), 1.0, is_reliable=True).confidence >= 0.0


def test_a_score_is_the_mean_of_the_levels_and_a_choice_the_most_likely_one() -> None:
    answer = Answer((0.25, 0.25, 0.5), 1.0, is_reliable=True)
    assert (answer.expected, answer.best) == (1.25, 2)
    assert Answer((0.5, 0.5), 1.0, is_reliable=True).best == 0


# Requests


async def test_probabilities_are_normalised_and_their_sum_is_the_mass() -> None:
    made = FakeSidecar()
    made.hermes.answers = [
        ChoiceScores({"True": 0.375, "False": 0.125}, 40, 8),
        ChoiceScores({"1": 0.0625, "2": 0.1875}, 50, 30),
    ]
    decided = await made.sidecar.decisions.decide(
        "hermes", GIVEN, [PREDICATE, CHOICE], Deadline.after(60.0)
    )
    assert decided.answers == (
        Answer((0.75, 0.25), 0.5, is_reliable=True),
        Answer((0.25, 0.75), 0.25, is_reliable=False),
    )
    assert (decided.prompt_tokens, decided.cached_tokens) == (90, 38)


async def test_the_input_comes_first_and_the_question_last() -> None:
    made = FakeSidecar()
    made.hermes.answers = [ChoiceScores({"True": 1.0, "False": 0.0})]
    await made.sidecar.decisions.decide("hermes", GIVEN, [PREDICATE], Deadline.after(60.0))
    assert made.hermes.requests == [
        (
            [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": f"Input:\nLong ABC, RSI 81.\n\n{PREDICATE.text()}"},
                {"role": "assistant", "content": ANSWER_START},
            ],
            ("True", "False"),
        )
    ]


async def test_system_messages_of_the_input_replace_our_own() -> None:
    made = FakeSidecar()
    made.hermes.answers = [ChoiceScores({"True": 1.0, "False": 0.0})]
    given = Input("Long ABC.", "You are strict.")
    await made.sidecar.decisions.decide("hermes", given, [PREDICATE], Deadline.after(60.0))
    ((messages, _),) = cast(list[Any], made.hermes.requests)
    assert messages[0] == {"role": "system", "content": "You are strict."}


async def test_all_questions_have_one_deadline() -> None:
    made = FakeSidecar()
    made.phi3.answers = [ChoiceScores({"True": 1.0, "False": 0.0})] * 2
    await made.sidecar.decisions.decide("phi3", GIVEN, [PREDICATE, PREDICATE], Deadline.after(60.0))
    one, other = made.phi3.calls
    assert one.deadline is not None
    assert one.deadline is other.deadline
    assert one.deadline.seconds == 60.0


async def test_an_answer_without_any_probability_is_left_out() -> None:
    made = FakeSidecar()
    made.hermes.answers = [
        ChoiceScores({"True": 0.0, "False": 0.0}),
        ChoiceScores({"1": 0.5, "2": 0.5}),
    ]
    decided = await made.sidecar.decisions.decide(
        "hermes", GIVEN, [PREDICATE, CHOICE], Deadline.after(60.0)
    )
    assert decided.answers == (None, Answer((0.5, 0.5), 1.0, is_reliable=True))


async def test_a_mass_that_rounding_takes_above_one_is_one() -> None:
    made = FakeSidecar()
    made.hermes.answers = [ChoiceScores({"True": 0.75, "False": 0.5})]
    decided = await made.sidecar.decisions.decide(
        "hermes", GIVEN, [PREDICATE], Deadline.after(60.0)
    )
    assert decided.answers == (Answer((0.6, 0.4), 1.0, is_reliable=True),)


@pytest.mark.parametrize("found", [{"True": 1.0}, {"True": math.nan, "False": 0.5}])
async def test_a_model_that_leaves_an_answer_out_is_unavailable(found: dict[str, float]) -> None:
    made = FakeSidecar()
    made.hermes.answers = [ChoiceScores(found)]
    with pytest.raises(ModelUnavailable, match="no probability") as caught:
        await made.sidecar.decisions.decide("hermes", GIVEN, [PREDICATE], Deadline.after(60.0))
    assert caught.value.retry_after == 1


async def test_an_input_that_does_not_fit_is_named() -> None:
    made = FakeSidecar()
    made.hermes.answers = [
        InvalidRequest("it takes 9000 tokens, which is too many", field="prompt")
    ]
    with pytest.raises(InvalidRequest) as caught:
        await made.sidecar.decisions.decide("hermes", GIVEN, [PREDICATE], Deadline.after(60.0))
    assert caught.value.detail == (
        "input: with one of the questions it takes 9000 tokens, which is too many"
    )


async def test_a_full_queue_is_not_hidden() -> None:
    made = FakeSidecar()
    made.hermes.answers = [QueueFull("The hermes queue is full.", retry_after=7)]
    with pytest.raises(QueueFull):
        await made.sidecar.decisions.decide("hermes", GIVEN, [PREDICATE], Deadline.after(60.0))


async def test_an_adapter_answers_only_while_it_is_in_use() -> None:
    made = FakeSidecar()
    made.phi3.answers = [ChoiceScores({"True": 0.5, "False": 0.5}, adapter="20260102")]
    with pytest.raises(NotFound, match="/adapters/swap"):
        await made.sidecar.decisions.decide(
            "phi3:20260102", GIVEN, [PREDICATE], Deadline.after(60.0)
        )
    await made.phi3.use_adapter(Adapter(Path("/adapters/20260102")))
    decided = await made.sidecar.decisions.decide(
        "phi3:20260102", GIVEN, [PREDICATE], Deadline.after(60.0)
    )
    assert decided.answers == (Answer((0.5, 0.5), 1.0, is_reliable=True),)


async def test_a_swap_before_an_answer_is_an_error_for_the_adapter_that_was_named() -> None:
    made = FakeSidecar()
    await made.phi3.use_adapter(Adapter(Path("/adapters/20260102")))
    named, other = (
        ChoiceScores({"True": 0.5, "False": 0.5}, adapter=name) for name in ("20260102", "20260103")
    )
    made.phi3.answers = [named, other, named, other]
    with pytest.raises(NotFound, match="not in use"):
        await made.sidecar.decisions.decide(
            "phi3:20260102", GIVEN, [PREDICATE, PREDICATE], Deadline.after(60.0)
        )
    decided = await made.sidecar.decisions.decide(
        "phi3", GIVEN, [PREDICATE, PREDICATE], Deadline.after(60.0)
    )
    assert decided.answers == (Answer((0.5, 0.5), 1.0, is_reliable=True),) * 2
