"""`/v1/chat/completions` over fake models."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llm_sidecar import proposals
from llm_sidecar.errors import DeadlineExceeded, InvalidRequest, ModelUnavailable, QueueFull
from llm_sidecar.models.base import Delta, GenerationRequest, TokenLogprob
from llm_sidecar.services.client_schemas import guidance_of
from llm_sidecar.services.conversation import MAX_TOKENS
from osiris.openai import logprobs
from tests.unit.fakes import FakeSidecar, completion
from tests.unit.openai.events import chunks_of
from tests.unit.services.samples import PROMPT, WRITTEN

URL = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "hermes", "messages": [{"role": "user", "content": "What now?"}]}
TURNS = CHAT["messages"]
TEXT = completion("Hold it.", model="hermes/fake", cached_tokens=5)
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 9,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 5},
}
CLOSE = {"type": "function", "function": {"name": "close"}}
CALLED = {"id": "1", "type": "function", "function": {"name": "close", "arguments": "{ }"}}
CALL = completion('{"name":"close","arguments":{"n":1}}')
TOKEN = TokenLogprob(1, "Ä".encode()[:1], -0.5, (TokenLogprob(2, b"B", -0.25),))


async def refused(asking: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The error object of a 400."""
    response = await asking.post(URL, json=body)
    assert response.status_code == 400, response.text
    (error,) = response.json().values()
    assert error["type"] == "invalid_request_error"
    found: dict[str, Any] = error
    return found


# Whole answers


@pytest.mark.parametrize("slash", ["", "/"])
async def test_an_answer_has_all_fields_that_clients_read(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, slash: str
) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    response = await asking.post(URL + slash, json=CHAT)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "hermes",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hold it.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    headers = {
        name: response.headers[name]
        for name in ("X-Model", "X-Finish-Reason", "X-Prompt-Tokens", "X-Completion-Tokens")
    }
    assert list(headers.values()) == ["hermes/fake", "stop", "7", "9"]
    assert "X-Grounded" not in response.headers
    assert fake_sidecar.happened.log == []


async def test_a_proposal_is_the_content_of_the_answer(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.phi3.answers = [WRITTEN]
    body = {"model": "phi3", "messages": [{"role": "user", "content": PROMPT}]}
    response = await asking.post(URL, json=body)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == WRITTEN.text
    assert response.headers["X-Grounded"] == "true"
    (request,) = fake_sidecar.phi3.requests
    assert isinstance(request, GenerationRequest)
    assert request.messages == proposals.build_messages(PROMPT)


async def test_a_deadline_counts_as_length(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Hold", finish_reason="deadline")]
    response = await asking.post(URL, json=CHAT)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["X-Finish-Reason"] == "length"


async def test_several_choices_are_generated_separately(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [TEXT, completion("Sell.", finish_reason="length")]
    body = {**CHAT, "n": 2, "seed": (1 << 32) - 1, "temperature": 0.5}
    response = await asking.post(URL, json=body)
    answer = response.json()
    shown = [(one["index"], one["finish_reason"]) for one in answer["choices"]]
    assert shown == [(0, "stop"), (1, "length")]
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["usage"]["completion_tokens"] == 18
    assert response.headers["X-Completion-Tokens"] == "18"
    seeds = [getattr(request, "seed", None) for request in fake_sidecar.hermes.requests]
    assert seeds == [(1 << 32) - 1, 0]


async def test_log_probabilities_are_shown(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Ä", logprobs=(TOKEN,))]
    fake_sidecar.hermes.answers = [
        [
            Delta("Ä", "hermes/fake", logprobs=(TOKEN,)),
            Delta("", "hermes/fake", finish_reason="stop"),
        ]
    ]
    response = await asking.post(URL, json={**CHAT, "logprobs": True, "top_logprobs": 1})
    assert response.json()["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "\N{REPLACEMENT CHARACTER}",
                "logprob": -0.5,
                "bytes": [195],
                "top_logprobs": [{"token": "B", "logprob": -0.25, "bytes": [66]}],
            }
        ],
        "refusal": None,
    }
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert request.logprobs == 1


@pytest.mark.parametrize(("most", "status"), [(4, 200), (3, 400)])
async def test_the_log_probabilities_of_all_choices_are_bounded_together(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    status: int,
) -> None:
    """Each choice has one token, with one more that is likely."""
    monkeypatch.setattr(logprobs, "MAX_ENTRIES", most)
    fake_sidecar.hermes.answers = [
        [Delta("Ä", "hermes/fake", finish_reason="stop", logprobs=(TOKEN,))] for _ in range(2)
    ]
    response = await asking.post(URL, json={**CHAT, "logprobs": True, "top_logprobs": 1, "n": 2})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "logprobs"


async def test_a_call_is_shown(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [CALL]
    body = {**CHAT, "tools": [CLOSE], "tool_choice": "required"}
    (choice,) = (await asking.post(URL, json=body)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["refusal"]) == (None, None)
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "close", "arguments": '{"n":1}'}}


# The request to the model


@pytest.mark.parametrize(
    ("sent", "turns"),
    [
        ([{"role": "developer", "content": "s"}], [{"role": "system", "content": "s"}]),
        (
            [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}],
            [{"role": "user", "content": "a\nb"}],
        ),
        (
            [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "close", "arguments": "{ }"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "done"},
            ],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": '{"name":"close","arguments":{}}'},
                {"role": "user", "content": "Result of close:\ndone"},
            ],
        ),
    ],
)
async def test_turns_of_every_kind_become_text(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    sent: list[dict[str, Any]],
    turns: list[dict[str, Any]],
) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    response = await asking.post(URL, json={**CHAT, "messages": sent})
    assert response.status_code == 200, response.text
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    assert request.messages == turns


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6, "max_tokens": 6}, {"max_tokens": 6}),
        ({"temperature": 0, "top_p": 1}, {"temperature": 0.0, "top_p": 1.0}),
        ({"seed": -1}, {"seed": (1 << 32) - 1}),
        (
            {"response_format": {"type": "json_object"}},
            {"guidance": guidance_of({"type": "object"}), "check_answer": True},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": {"type": "array"}},
                }
            },
            {"guidance": guidance_of({"type": "array"}), "check_answer": True},
        ),
        ({"response_format": {"type": "text"}, "tool_choice": "auto", "tools": []}, {}),
        # Fields that change nothing.
        (
            {
                "logit_bias": {},
                "frequency_penalty": 0,
                "presence_penalty": 0.0,
                "modalities": ["text"],
                "functions": [],
                "audio": None,
                "n": None,
                "stop": None,
                "stream": False,
                "stream_options": {"include_usage": True},
                "user": "desk",
                "store": True,
                "reasoning_effort": "low",
                "prediction": {"type": "content", "content": "x"},
                "metadata": {"a": "b"},
            },
            {},
        ),
    ],
)
async def test_fields_reach_the_model(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    fields: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    response = await asking.post(URL, json=CHAT | fields)
    assert response.status_code == 200, response.text
    limit: dict[str, Any] = {"max_tokens": MAX_TOKENS, "fit_context": "max_tokens" not in changes}
    expected: dict[str, Any] = limit | {"temperature": None} | changes
    assert fake_sidecar.hermes.requests == [GenerationRequest(TURNS, **expected)]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"messages": []}, "messages", "array_below_min_length"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [*TURNS, {"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[1].content[0].type",
            "unsupported_value",
        ),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]},
            "messages[0].audio",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "a\u0007"}]},
            "messages[0].content",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "2", "content": "x"}]},
            "messages[0].tool_call_id",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "x" * 33_000}]}, "messages", None),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": ["a" * 257]}, "stop", "string_above_max_length"),
        ({"messages": [{"role": "user"}] * 1025}, "messages", "array_above_max_length"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 257}]},
            "messages[0].content",
            "array_above_max_length",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALLED] * 129}]},
            "messages[0].tool_calls",
            "array_above_max_length",
        ),
        ({"stop": ""}, "stop", "invalid_type"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "tools": [CLOSE]}, "logprobs", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [CLOSE, CLOSE]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "always"}, "tool_choice", "unsupported_value"),
        (
            {
                "tools": [CLOSE],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice",
            "invalid_value",
        ),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"functions": [{"name": "a"}]}, "functions", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"top_k": 5}, "top_k", "unsupported_parameter"),
        ({"guided_regex": "a"}, "guided_regex", "unsupported_parameter"),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    changes: dict[str, Any],
    param: str,
    code: str | None,
) -> None:
    error = await refused(asking, CHAT | changes)
    assert error["param"] == param, error
    assert error["message"].startswith(param)
    if code is not None:
        assert error["code"] == code
    assert fake_sidecar.hermes.requests == []


async def test_a_missing_field_is_named(asking: httpx.AsyncClient) -> None:
    assert await refused(asking, {"model": "hermes"}) == {
        "message": "messages: Field required",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "missing_required_parameter",
    }


# Errors of models


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (
            QueueFull("Full.", retry_after=7),
            429,
            {"type": "rate_limit_exceeded", "param": None, "code": "rate_limit_exceeded"},
        ),
        (
            ModelUnavailable("It is loading.", retry_after=7),
            503,
            {"type": "server_error", "param": None, "code": None},
        ),
        (
            DeadlineExceeded("Too late.", retry_after=7),
            504,
            {"type": "server_error", "param": None, "code": None},
        ),
        (
            InvalidRequest("it takes 9 tokens", field="prompt", exceeds_context=True),
            400,
            {
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            },
        ),
    ],
)
async def test_an_error_before_the_first_token_has_its_own_status(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    error: Any,
    status: int,
    expected: dict[str, Any],
    stream: bool,
) -> None:
    fake_sidecar.hermes.answers = [error]
    response = await asking.post(URL, json={**CHAT, "stream": stream})
    assert response.status_code == status
    found = response.json()["error"]
    assert found.pop("message") == error.detail.replace("prompt", "messages")
    assert found == expected
    assert response.headers.get("Retry-After") == (None if status == 400 else "7")


async def test_an_unsupported_keyword_is_named_with_its_field(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [
        InvalidRequest("not is not supported; leave it out", field="schema")
    ]
    error = await refused(asking, {**CHAT, "response_format": {"type": "json_object"}})
    assert error["message"] == "response_format: not is not supported; leave it out"
    assert (error["param"], error["code"]) == ("response_format", "invalid_value")


async def test_a_limit_is_named_as_this_api_names_it(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    error = await refused(asking, {**CHAT, "model": "phi3", "max_tokens": 95})
    assert error["message"] == "max_tokens: a proposal needs 96 tokens; send at least that"
    assert error["param"] == "max_tokens"


async def test_an_unknown_model_is_404(asking: httpx.AsyncClient) -> None:
    response = await asking.post(URL, json={**CHAT, "model": "gpt-4"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


# Streams


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [
        choice["delta"] for one in chunks for choice in one["choices"] if choice["index"] == index
    ]


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    chunks = chunks_of(await asking.post(URL, json={**CHAT, "stream": True}))
    assert deltas(chunks) == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hold"},
        {"content": " it."},
        {},
    ]
    reasons = [one["choices"][0]["finish_reason"] for one in chunks]
    assert reasons == [None, None, None, "stop"]
    assert len({(one["id"], one["created"]) for one in chunks}) == 1
    for chunk in chunks:
        assert chunk["id"].startswith("chatcmpl-")
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "hermes")
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
        assert "usage" not in chunk


async def test_the_usage_comes_last_without_choices(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [TEXT]
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(await asking.post(URL, json=body))
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert [one["usage"] for one in chunks] == [None] * len(chunks)


async def test_a_call_streams(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [CALL]
    body = {**CHAT, "tools": [CLOSE], "stream": True}
    chunks = chunks_of(await asking.post(URL, json=body))
    role, *calls, end = deltas(chunks)
    assert role == {"role": "assistant", "content": None, "refusal": None}
    assert end == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    pieces = [one["tool_calls"][0] for one in calls]
    assert pieces[0].pop("id").startswith("call_")
    assert pieces[0] == {
        "index": 0,
        "type": "function",
        "function": {"name": "close", "arguments": ""},
    }
    assert all(set(piece) == {"index", "function"} for piece in pieces[1:])
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"n":1}'


async def test_several_choices_stream_beside_each_other(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [TEXT, completion("Sell.")]
    body = {**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(await asking.post(URL, json=body))
    texts = ["".join(one.get("content") or "" for one in deltas(chunks, n)) for n in (0, 1)]
    assert sorted(texts) == ["Hold it.", "Sell."]
    assert last["usage"]["completion_tokens"] == 18


async def test_an_error_in_the_middle_is_the_last_event(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    # The stream of the model ends before the generation has finished.
    fake_sidecar.hermes.answers = [[Delta("Hold", "hermes/fake")]]
    response = await asking.post(URL, json={**CHAT, "stream": True})
    assert response.status_code == 200
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert "[DONE]" not in data
    assert json.loads(data[-1]) == {
        "error": {
            "message": "The model ended its answer before it was complete; try again.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
