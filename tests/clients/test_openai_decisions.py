"""The Decisions API of the `openai` package, which version 2 does not have."""

from __future__ import annotations

from typing import Any, Final

import openai
import pytest
from openai import OpenAI

from tests.clients.sidecar import KEY, PROMPT

LEVELS: Final = [{"label": "bad"}, {"label": "fair"}, {"label": "good"}]


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60.0)


def decide(client: OpenAI, *questions: dict[str, Any]) -> Any:
    return client.decisions.create(model="hermes", input=PROMPT, questions=questions)


def test_each_question_gets_an_answer_of_its_type_in_order(client: OpenAI) -> None:
    decision = decide(
        client,
        {"type": "predicate", "instructions": "The position gains.", "name": "gains"},
        {
            "type": "choice",
            "instructions": "What to do?",
            "choices": [{"value": "adjust"}, {"value": "pass"}, {"value": True}],
        },
        {"type": "score", "instructions": "How good is it?", "levels": LEVELS},
    )
    predicate, choice, score = decision.answers
    assert (predicate.type, predicate.name) == ("predicate", "gains")
    assert 0 <= predicate.probability <= 1
    assert (choice.type, choice.name) == ("choice", None)
    assert [each.value for each in choice.probabilities] == ["adjust", "pass", True]
    assert sum(each.probability for each in choice.probabilities) == pytest.approx(1)
    likeliest = max(choice.probabilities, key=lambda each: each.probability)
    assert choice.choice == likeliest.value
    assert [each.label for each in score.probabilities] == ["bad", "fair", "good"]
    expected = sum(each.value * each.probability for each in score.probabilities)
    assert score.score == pytest.approx(expected)
    usage = decision.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_question_gets_the_same_answer_beside_others(client: OpenAI) -> None:
    question = {"type": "score", "instructions": "How good is it?", "levels": LEVELS}
    other = {"type": "predicate", "instructions": "The position gains."}
    (alone,) = decide(client, question).answers
    _, beside = decide(client, other, question).answers
    assert beside.score == pytest.approx(alone.score, abs=1e-4)


@pytest.mark.parametrize(
    ("question", "param"),
    [
        ({"type": "score", "instructions": "x", "levels": LEVELS[:1]}, "levels"),
        ({"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}, "choices"),
        ({"type": "guess", "instructions": "x"}, "questions"),
    ],
    ids=["levels", "choices", "type"],
)
def test_a_bad_question_is_a_bad_request(
    client: OpenAI, question: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        decide(client, question)
    assert param in caught.value.param
