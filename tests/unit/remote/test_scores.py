"""Scores by decisions, by log probabilities and by text."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import httpx
import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import Question
from llm_sidecar.models.local.load_state import ModelLimits
from tests.unit.remote.openai_server import (
    GatedStream,
    OpenAIServer,
    decided,
)
from tests.unit.remote.samples import (
    SCORE,
    Make,
    answer,
    no_rest,
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


async def score(
    make: Make, *answers: Any, schema_formats: set[str] | None = None, logprobs: int = 20
) -> Any:
    server = OpenAIServer(*answers)
    server.schema_formats = {"regex"} if schema_formats is None else schema_formats
    server.top_logprobs = logprobs
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    found = {name: round(share, 6) for name, share in scores.probabilities.items() if share}
    return found, server


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        (answer(400), "The hermes server a refuses this request (400); its log says why."),
        (answer(500), "The hermes server a answers with status 500; its log says why."),
        (httpx.Response(200, json={"answers": []}), "It sends no decision."),
    ],
)
async def test_a_refused_decision_is_scored_by_log_probabilities_logged_once_and_counted(
    make: Make, caplog: pytest.LogCaptureFixture, refusal: httpx.Response, why: str
) -> None:
    seven = scored({"7": 0.5})
    server = OpenAIServer(refusal, seven, refusal, seven)
    server.decisions = True
    model = make(a=server)
    for _ in range(2):
        scores = await model.score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
        assert scores.mass == pytest.approx(0.5)
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warnings == [
        "The hermes server a does not answer a question by /decisions; its log probabilities or "
        f"its text are read instead: {why}"
    ]
    assert server_of(model).decisions_refused == 2


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
    # No token may be excluded from the next one's probabilities.
    assert re.fullmatch(server.requests[1][1]["regex"], '1},\n"reason')
    first, second = scored({"2": 0.5, "1": 0.25}), scored({"1": 0.25}, {"0": 0.8, "}": 0.2})
    found, server = await score(make, first, second, schema_formats={"grammar"})
    assert found == {"2": 0.5, "1": 0.05, "10": 0.2}
    assert server.requests[1][1]["grammar"] == r'root ::= "1" [^\x00]*'


async def test_a_server_that_takes_only_json_schemas_divides_an_unlikely_digit(make: Make) -> None:
    first, second = scored({"2": 0.5, "1": 0.25}), scored({"1": 0.245}, {"0": 0.8, "}": 0.2})
    found, server = await score(make, first, second, schema_formats={"json_schema"})
    assert found == {"2": 0.5, "1": 0.05, "10": 0.2}
    schema = server.requests[1][1]["response_format"]["json_schema"]["schema"]
    assert schema == {"const": 10}


@pytest.mark.parametrize(
    "second",
    [
        # The probabilities among the tokens that the schema allows.
        scored({"1": 1.0}, {"0": 1.0}),
        answer(400),
        httpx.Response(200, json={"choices": [{"message": {"content": "10"}}]}),
    ],
)
async def test_an_answer_is_scored_by_its_text_if_a_likely_digit_is_not_divided(
    make: Make, second: httpx.Response
) -> None:
    first = scored({"2": 0.5, "1": 0.05})
    found, _ = await score(make, first, second, schema_formats={"json_schema"})
    # The mass of an answer that is known as text only, rounded.
    assert found == {"2": 0.0}


async def test_an_unlikely_digit_that_is_not_divided_counts_for_nothing(make: Make) -> None:
    first = scored({"2": 0.5, "1": 0.04})
    found, _ = await score(make, first, answer(400), schema_formats={"json_schema"})
    assert found == {"2": 0.5}
    found, _ = await score(make, scored({"2": 0.5, "1": 0.04}), schema_formats=set())
    assert found == {"2": 0.5}


async def test_a_text_alone_scores_with_hardly_any_mass(make: Make) -> None:
    said = httpx.Response(200, json={"choices": [{"message": {"content": '{"score": 10}'}}]})
    server = OpenAIServer(said)
    server.top_logprobs = 0
    scores = await make(a=server).score_choices(SCORE, hermes_plugin.SCORE_ANSWERS)
    assert hermes_plugin.read_score(scores) == 1.0
    assert round(scores.mass, 6) == 0.0
    assert not hermes_plugin.is_reliable(scores, 0.01)


async def test_impossible_log_probabilities_count_as_none(make: Make) -> None:
    # Together 1.2; and a constant for each token.
    for shares in ({"7": 0.6, "8": 0.6}, dict.fromkeys("789", 1.0)):
        found, _ = await score(make, scored(shares))
        # The mass of an answer that is known as text only, rounded.
        assert found == {"7": 0.0}
    found, _ = await score(make, scored({"7": 0.6, "8": 0.405}))
    assert found == {"7": 0.6, "8": 0.405}


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


CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


async def test_the_server_continues_the_beginning_of_an_answer(make: Make) -> None:
    first, second = scored({"2": 0.5, "1": 0.25}), scored({"1": 0.25}, {"0": 0.8, "}": 0.2})
    _, server = await score(make, first, second)
    assert [body["messages"] for _, body in server.requests] == [SCORE, SCORE]
    assert all(CONTINUE.items() <= body.items() for _, body in server.requests)


async def test_a_server_may_refuse_the_beginning_of_an_answer(make: Make) -> None:
    found, server = await score(make, answer(400), scored({"7": 0.5}))
    assert found == {"7": 0.5}
    (_, first), (_, second) = server.requests
    assert (first["messages"], second["messages"]) == (SCORE, SCORE[:-1])
    assert CONTINUE.keys().isdisjoint(second)


# Several questions


QUESTIONS = [Question([{"role": "user", "content": f"Is it {n}?"}], ("7", "8")) for n in range(9)]


class CountingServer(OpenAIServer):
    """Answers the question `Is it N?` with 7, which has the probability (N + 1) / 10.

    Attributes:
        running: the number of questions that it has now.
        most: the maximum of `running`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = self.most = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        found = re.search(rb"Is it (\d)", request.content)
        if found is None:
            return await super().__call__(request)
        self.running += 1
        self.most = max(self.most, self.running)
        # All requests that can start do so.
        for _ in range(50):
            await asyncio.sleep(0)
        self.running -= 1
        self.answers.append(scored({"7": (int(found[1]) + 1) / 10}))
        return await super().__call__(request)


async def test_questions_are_answered_in_order_and_a_few_at_once(make: Make) -> None:
    server = CountingServer()
    model = make(a=server, options={"limits": ModelLimits(queue_length=1)})
    found = await model.score_questions(QUESTIONS)
    assert [round(scores.probabilities["7"], 6) for scores in found] == [
        *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    assert server.most == 4
    assert model.status().requests == 0


async def test_the_first_question_that_fails_ends_the_others(make: Make) -> None:
    waiting = [GatedStream([]) for _ in range(8)]
    server = OpenAIServer(*waiting[:3], answer(500), *waiting[3:])
    model = make(a=server)
    with pytest.raises(ModelUnavailable, match="status 500"):
        await model.score_questions(QUESTIONS)
    assert [stream.closed for stream in waiting] == [stream.begun.is_set() for stream in waiting]
    assert all(stream.closed for stream in waiting[:3])
    assert server_of(model).outstanding == model.status().requests == 0


async def test_after_its_rest_a_server_gets_one_question_of_a_request_at_a_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.CircuitBreaker._rest", no_rest)
    server = CountingServer()
    # Each score is asked for twice: with the beginning of the answer and without it.
    server.answers += [answer(500)] * 6
    model = make(a=server)
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="status 500"):
            await model.score_choices(SCORE, ("7", "8"))
    assert len(await model.score_questions(QUESTIONS)) == len(QUESTIONS)
    assert server.most == 1
    # The success has closed the circuit.
    await model.score_questions(QUESTIONS)
    assert server.most == 4


async def test_a_server_that_has_failed_does_not_slow_down_another_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.CircuitBreaker._rest", no_rest)
    failing, working = CountingServer(), CountingServer()
    failing.answers += [answer(500)] * 6
    working.answers += [scored({"7": 0.5})] * 6
    model = make(failing=failing, working=working)
    while failing.answers:
        await model.score_choices(SCORE, ("7", "8"))
    assert len(await model.score_questions(QUESTIONS)) == len(QUESTIONS)
    # The other one has one question.
    assert working.most == 3


async def test_questions_are_divided_among_the_servers(make: Make) -> None:
    one, two = CountingServer(), CountingServer()
    await make(one=one, two=two).score_questions(QUESTIONS)
    assert (one.most, two.most) == (2, 2)
