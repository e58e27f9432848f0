"""Scores by decisions, by log probabilities and by text."""

from __future__ import annotations

import math
import re
from typing import Any

import httpx
import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.errors import ModelUnavailable
from tests.unit.remote.openai_server import (
    OpenAIServer,
    decided,
)
from tests.unit.remote.samples import (
    SCORE,
    Make,
    answer,
    server_of,
)


async def test_decisions_score_first(make: Make) -> None:
    server = OpenAIServer(httpx.Response(200, json=decided(0.45, _7=0.75, _10=0.25)))
    server.decisions = True
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    # The confidence is the probability of the most likely answer among all tokens.
    assert scores.probabilities["7"] == pytest.approx(0.45)
    assert scores.probabilities["10"] == pytest.approx(0.15)
    assert scores.mass == pytest.approx(0.6)
    ((path, body),) = server.requests
    assert path == "/v1/decisions"
    system, user, _ = (message["content"] for message in SCORE)
    assert body["input"] == f"{system}\n\n{user}"
    assert [one["value"] for one in body["questions"][0]["choices"]] == [*map(str, range(11))]


async def test_the_decisions_of_another_sidecar_are_not_used(make: Make) -> None:
    server = OpenAIServer(scored({"7": 0.5}))
    server.decisions = True
    server.decided = decided(0.5, yes=0.5, no=0.5)
    server.decided["answers"][0]["answer_mass"] = 0.9
    model = make(a=server)
    await model.score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    assert [path for path, _ in server.requests] == ["/v1/chat/completions"]
    assert server_of(model).scores == "logprobs"


def scored(*positions: dict[str, float]) -> httpx.Response:
    """An answer with the log probabilities of its tokens; the first of each is sampled."""
    content = [
        {
            "token": next(iter(tops)),
            "logprob": math.log(next(iter(tops.values()))),
            "top_logprobs": [
                {"token": token, "logprob": math.log(share)} for token, share in tops.items()
            ],
        }
        for tops in positions
    ]
    text = "".join(str(entry["token"]) for entry in content)
    choice = {"message": {"content": text}, "logprobs": {"content": content}}
    return httpx.Response(200, json={"choices": [choice]})


async def score(make: Make, *answers: Any, ways: set[str] | None = None, logprobs: int = 20) -> Any:
    server = OpenAIServer(*answers)
    server.ways = {"regex"} if ways is None else ways
    server.top_logprobs = logprobs
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    found = {name: round(share, 6) for name, share in scores.probabilities.items() if share}
    return found, server


async def test_a_refused_decision_is_read_from_an_answer(make: Make) -> None:
    server = OpenAIServer(answer(400), scored({"7": 0.5}))
    server.decisions = True
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    assert scores.mass == pytest.approx(0.5)


async def test_log_probabilities_score_next(make: Make) -> None:
    found, server = await score(make, scored({"7": 0.5, " 8": 0.25, "10": 0.125, "x": 0.1}))
    assert found == {"7": 0.5, "8": 0.25, "10": 0.125}
    ((path, body),) = server.requests
    assert (path, body["messages"]) == ("/v1/chat/completions", SCORE)
    assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0.0)


async def test_an_answer_may_repeat_how_it_begins(make: Make) -> None:
    found, _ = await score(make, scored({'{"': 0.9}, {"score": 0.9}, {'":': 0.9}, {" 6": 0.75}))
    assert found == {"6": 0.75}


async def test_digits_of_their_own_are_divided_by_the_next_token(make: Make) -> None:
    found, _ = await score(make, scored({"1": 0.5, "2": 0.25}, {"0": 0.5, "}": 0.5}))
    assert found == {"1": 0.25, "10": 0.25, "2": 0.25}


async def test_an_unlikely_digit_is_divided_by_a_second_answer(make: Make) -> None:
    first, second = scored({"2": 0.5, "1": 0.25}), scored({"1": 0.25}, {"0": 0.8, "}": 0.2})
    found, server = await score(make, first, second)
    assert found == {"2": 0.5, "1": 0.05, "10": 0.2}
    assert re.fullmatch(server.requests[1][1]["regex"], "1}")
    first, second = scored({"2": 0.5, "1": 0.25}), scored({"1": 0.25}, {"0": 0.8, "}": 0.2})
    found, server = await score(make, first, second, ways={"grammar"})
    assert found == {"2": 0.5, "1": 0.05, "10": 0.2}
    assert server.requests[1][1]["grammar"] == r'root ::= "1" [^\x00]'


async def test_without_a_way_to_ask_for_it_such_a_digit_counts_for_nothing(make: Make) -> None:
    found, _ = await score(make, scored({"2": 0.5, "1": 0.25}), ways={"json_schema"})
    assert found == {"2": 0.5}


async def test_a_text_alone_scores_with_hardly_any_mass(make: Make) -> None:
    said = httpx.Response(200, json={"choices": [{"message": {"content": '{"score": 10}'}}]})
    server = OpenAIServer(said)
    server.top_logprobs = 0
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    assert hermes_plugin.read_score(scores) == 1.0
    assert round(scores.mass, 6) == 0.0
    assert not hermes_plugin.is_reliable(scores, 0.01)


async def test_a_text_without_an_answer_is_no_score(make: Make) -> None:
    said = httpx.Response(200, json={"choices": [{"message": {"content": "Good."}}]})
    found, _ = await score(make, said, logprobs=0)
    assert found == {}


async def test_a_question_that_a_server_refuses_twice_is_not_the_fault_of_the_client(
    make: Make,
) -> None:
    with pytest.raises(ModelUnavailable, match="refuses this request") as caught:
        await score(make, answer(400), answer(400))
    assert caught.value.retry_after == 5


async def test_a_template_may_refuse_the_beginning_of_an_answer(make: Make) -> None:
    found, server = await score(make, answer(400), scored({"7": 0.5}))
    assert found == {"7": 0.5}
    assert server.requests[1][1]["messages"] == SCORE[:-1]
