"""`/v1/responses` over fake models."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openresponses_types import types
from pydantic import BaseModel

from llm_sidecar.engines.base import GenerationRequest
from llm_sidecar.errors import DeadlineExceeded, ModelUnavailable, QueueFull
from llm_sidecar.models.base import Delta, TokenLogprob
from llm_sidecar.services.tools import call_text, result_text
from tests.unit.fakes import FakeSidecar, completion
from tests.unit.openai.events import chunks_of

TOOL = {
    "type": "function",
    "name": "get_price",
    "description": "The last price.",
    "parameters": {"type": "object", "properties": {"ticker": {"type": "string"}}},
    "strict": True,
}
CALL = '{"name":"get_price","arguments":{"ticker":"ABC"}}'
FULL = QueueFull("The hermes queue is full.", retry_after=7)


async def ask(asking: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await asking.post("/v1/responses", json={"model": "hermes", "input": "Hi.", **body})


async def answer(asking: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await ask(asking, **body)
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    return answered


async def events(asking: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; each has the name that is its type, and the next number."""
    response = await ask(asking, stream=True, **body)
    assert response.status_code == 200, response.text
    found = chunks_of(response)
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def requested(fake_sidecar: FakeSidecar) -> GenerationRequest:
    (request,) = fake_sidecar.hermes.requests
    assert isinstance(request, GenerationRequest)
    return request


async def refused(asking: httpx.AsyncClient, **body: Any) -> tuple[int, str | None, str]:
    response = await ask(asking, **body)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


# Answers


async def test_an_answer_is_a_response_with_one_message(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Sell it.", cached_tokens=3)]
    made = await answer(asking, metadata={"desk": "equities"}, store=True)
    (message,) = made["output"]
    assert made["id"].startswith("resp_")
    assert message["id"].startswith("msg_")
    assert message == {
        "type": "message",
        "id": message["id"],
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Sell it.", "annotations": [], "logprobs": []}],
    }
    assert made["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 16,
    }
    varying = {"id", "created_at", "completed_at", "output", "usage"}
    assert {name: value for name, value in made.items() if name not in varying} == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "frequency_penalty": 0,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"desk": "equities"},
        "model": "hermes",
        "parallel_tool_calls": True,
        "presence_penalty": 0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": None,
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1,
        "truncation": "disabled",
    }
    types.ResponseResource.model_validate(made)


async def test_an_empty_answer_is_an_empty_message(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("")]
    (message,) = (await answer(asking))["output"]
    assert [part["text"] for part in message["content"]] == [""]


async def test_an_answer_at_its_limit_is_incomplete(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Sell", finish_reason="length")]
    made = await answer(asking, max_output_tokens=16)
    assert (made["status"], made["completed_at"]) == ("incomplete", None)
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in made["output"]] == ["incomplete"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/"])
async def test_both_spellings_of_the_path_work(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, path: str
) -> None:
    fake_sidecar.hermes.answers = [completion("Yes.")]
    response = await asking.post(path, json={"model": "hermes", "input": "Hi."})
    assert response.status_code == 200


# Streams


async def test_a_stream_has_the_events_of_the_message_in_order(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Sell it.")]
    stream = await events(asking)
    created, begun, added, opened, first, second, text, part, done, completed = stream
    assert [event["type"] for event in stream] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    for event in (created, begun):
        response = event["response"]
        assert (response["status"], response["output"], response["usage"]) == (
            "in_progress",
            [],
            None,
        )
    assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])
    assert opened["part"]["text"] == ""
    assert (first["delta"], second["delta"]) == ("Sell", " it.")
    assert text["text"] == part["part"]["text"] == "Sell it."
    assert done["item"] == completed["response"]["output"][0]
    assert done["item"]["content"] == [part["part"]]
    ids = {event["item_id"] for event in (opened, first, second, text, part)}
    assert ids == {added["item"]["id"]} == {done["item"]["id"]}
    assert completed["response"]["usage"]["total_tokens"] == 16
    assert completed["response"]["id"] == created["response"]["id"]


EVENTS: dict[str, type[BaseModel]] = {
    "response.created": types.ResponseCreatedStreamingEvent,
    "response.in_progress": types.ResponseInProgressStreamingEvent,
    "response.completed": types.ResponseCompletedStreamingEvent,
    "response.incomplete": types.ResponseIncompleteStreamingEvent,
    "response.failed": types.ResponseFailedStreamingEvent,
    "response.output_item.added": types.ResponseOutputItemAddedStreamingEvent,
    "response.output_item.done": types.ResponseOutputItemDoneStreamingEvent,
    "response.content_part.added": types.ResponseContentPartAddedStreamingEvent,
    "response.content_part.done": types.ResponseContentPartDoneStreamingEvent,
    "response.output_text.delta": types.ResponseOutputTextDeltaStreamingEvent,
    "response.output_text.done": types.ResponseOutputTextDoneStreamingEvent,
    "response.function_call_arguments.delta": (
        types.ResponseFunctionCallArgumentsDeltaStreamingEvent
    ),
    "response.function_call_arguments.done": types.ResponseFunctionCallArgumentsDoneStreamingEvent,
    "error": types.ErrorStreamingEvent,
}


async def test_every_event_is_as_open_responses_has_it(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    half = Delta("Sell", "hermes/fake", prompt_tokens=7)
    fake_sidecar.hermes.answers = [
        completion("Sell it."),
        completion("Sell", finish_reason="length"),
        completion(CALL),
        [half],
    ]
    seen = set()
    for tools in ([], [], [TOOL], []):
        for event in await events(asking, tools=tools):
            EVENTS[event["type"]].model_validate(event)
            seen.add(event["type"])
    assert seen == set(EVENTS)


async def test_an_incomplete_stream_ends_with_response_incomplete(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Sell", finish_reason="length")]
    *_, done, last = await events(asking)
    assert done["item"]["status"] == "incomplete"
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_an_error_in_the_middle_is_an_event_and_a_failed_response(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    # A model that ends its answer before it is complete.
    fake_sidecar.hermes.answers = [[Delta("Sell", "hermes/fake", prompt_tokens=7)]]
    *_, error, failed = await events(asking)
    message = "The model ended its answer before it was complete; try again."
    assert {name: value for name, value in error.items() if name != "sequence_number"} == {
        "type": "error",
        "code": "server_error",
        "message": message,
        "param": None,
        "error": {
            "type": "server_error",
            "code": "server_error",
            "message": message,
            "param": None,
        },
    }
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": message}


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (FULL, 429, "rate_limit_exceeded", "7"),
        (ModelUnavailable("Loading.", retry_after=5), 503, "server_error", "5"),
        (DeadlineExceeded("Too late.", retry_after=2), 504, "server_error", "2"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_event_has_a_status(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    error: Exception,
    status: int,
    kind: str,
    retry_after: str,
    stream: bool,
) -> None:
    fake_sidecar.hermes.answers = [error]
    response = await ask(asking, stream=stream)
    assert (response.status_code, response.headers["Retry-After"]) == (status, retry_after)
    assert response.json()["error"]["type"] == kind


async def test_an_unknown_model_is_404(asking: httpx.AsyncClient) -> None:
    response = await ask(asking, model="gpt-5")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


# The requests to the model


async def test_a_text_is_the_users_turn_after_the_instructions(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Yes.")]
    await answer(asking, instructions="Be brief.", temperature=0.5, top_p=0.9, max_output_tokens=20)
    request = requested(fake_sidecar)
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
    ]
    assert (request.temperature, request.top_p, request.max_tokens) == (0.5, 0.9, 20)
    assert (request.guidance, request.logprobs) == (None, None)


async def test_items_are_turns(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [completion("182.40.")]
    await answer(
        asking,
        input=[
            {"role": "developer", "content": "Be brief."},
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is"},
                    {"type": "input_text", "text": "the price?"},
                ],
            },
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "call_1",
                "name": "get_price",
                "arguments": '{"ticker": "ABC"}',
                "status": "completed",
            },
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_text", "text": "182.40"}],
            },
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Seen.", "annotations": [], "logprobs": []}
                ],
            },
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
            {"role": "user", "content": "So?"},
        ],
    )
    assert requested(fake_sidecar).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\nthe price?"},
        {"role": "assistant", "content": call_text("get_price", '{"ticker": "ABC"}')},
        {"role": "user", "content": result_text("get_price", "182.40")},
        {"role": "assistant", "content": "Seen.\n\nNo more."},
        {"role": "user", "content": "So?"},
    ]


async def test_a_schema_is_guidance_and_stands_in_the_response(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    schema = {"type": "object", "properties": {"stop": {"type": "number"}}, "required": ["stop"]}
    fake_sidecar.hermes.answers = [completion('{"stop":2}')]
    wanted = {"type": "json_schema", "name": "stop", "schema": schema, "strict": True}
    made = await answer(asking, text={"format": wanted})
    assert made["text"] == {"format": {**wanted, "description": ""}}
    guidance = json.loads(requested(fake_sidecar).guidance or "")
    assert guidance["properties"] == schema["properties"]


async def test_json_object_is_guidance_for_any_object(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("{}")]
    made = await answer(asking, text={"format": {"type": "json_object"}})
    assert made["text"] == {"format": {"type": "json_object"}}
    assert json.loads(requested(fake_sidecar).guidance or "")["type"] == "object"


async def test_phi3_writes_free_text_only_if_asked(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.phi3.answers = [completion("Yes.")]
    await answer(asking, model="phi3", text={"format": {"type": "text"}})
    (request,) = fake_sidecar.phi3.requests
    assert isinstance(request, GenerationRequest)
    assert request.guidance is None


async def test_log_probabilities_come_with_deltas_and_text(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    other = TokenLogprob(2, b"Buy", -1.5)
    tokens = (TokenLogprob(1, b"Sell", -0.25, (other,)), TokenLogprob(3, b"\xe2\x82", -0.5))
    fake_sidecar.hermes.answers = [
        [
            Delta("Sell", "hermes/fake", logprobs=tokens[:1]),
            Delta("", "hermes/fake", logprobs=tokens[1:], finish_reason="length"),
        ]
    ]
    include = ["message.output_text.logprobs"]
    stream = await events(asking, include=include, top_logprobs=1)
    assert requested(fake_sidecar).logprobs == 1
    shown = [
        {
            "token": "Sell",
            "bytes": [83, 101, 108, 108],
            "logprob": -0.25,
            "top_logprobs": [{"token": "Buy", "bytes": [66, 117, 121], "logprob": -1.5}],
        },
        {"token": "\ufffd", "bytes": [226, 130], "logprob": -0.5, "top_logprobs": []},
    ]
    by_type = [(event["type"], event) for event in stream]
    deltas = [event["logprobs"] for kind, event in by_type if kind == "response.output_text.delta"]
    assert deltas == [[shown[0]], [shown[1]]]
    (done,) = (event for kind, event in by_type if kind == "response.output_text.done")
    assert done["logprobs"] == shown
    last = stream[-1]["response"]
    assert last["output"][0]["content"][0]["logprobs"] == shown
    assert last["top_logprobs"] == 1


async def test_top_logprobs_alone_changes_nothing(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Yes.")]
    await answer(asking, top_logprobs=3)
    assert requested(fake_sidecar).logprobs is None


# Tools


async def test_a_call_is_an_item(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [completion(CALL)]
    made = await answer(asking, tools=[TOOL], tool_choice={"type": "function", "name": "get_price"})
    (call,) = made["output"]
    assert call["id"].startswith("fc_")
    assert call["call_id"].startswith("call_")
    assert (call["type"], call["name"], call["status"]) == (
        "function_call",
        "get_price",
        "completed",
    )
    assert json.loads(call["arguments"]) == {"ticker": "ABC"}
    assert made["status"] == "completed"
    assert made["tools"] == [TOOL]
    assert made["tool_choice"] == {"type": "function", "name": "get_price"}


async def test_a_call_is_streamed(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [completion(CALL)]
    stream = await events(asking, tools=[TOOL])
    kinds = [event["type"] for event in stream]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    added, *deltas, done, ended, _ = stream[2:]
    assert (added["item"]["status"], added["item"]["arguments"]) == ("in_progress", "")
    assert "".join(event["delta"] for event in deltas) == done["arguments"]
    assert done["arguments"] == ended["item"]["arguments"]
    assert done["name"] == "get_price"
    assert json.loads(done["arguments"]) == {"ticker": "ABC"}


async def test_text_beside_tools_is_a_message(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion('{"text":"Sell it."}')]
    (message,) = (await answer(asking, tools=[TOOL]))["output"]
    assert message["content"][0]["text"] == "Sell it."


async def test_only_allowed_tools_are_offered(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion(CALL)]
    other = {**TOOL, "name": "sell"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "get_price"}],
    }
    made = await answer(asking, tools=[TOOL, other], tool_choice=choice)
    assert made["tool_choice"] == choice
    assert [tool["name"] for tool in made["tools"]] == ["get_price", "sell"]
    assert "sell" not in (requested(fake_sidecar).guidance or "")


async def test_with_tool_choice_none_no_tool_is_offered(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Sell it.")]
    await answer(asking, tools=[TOOL], tool_choice="none")
    assert requested(fake_sidecar).guidance is None


# Refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("context_management", [{"type": "compaction"}]),
        ("conversation", "conv_1"),
        ("frequency_penalty", 0.5),
        ("max_tokens", 10),
        ("moderation", {"model": "omni"}),
        ("n", 2),
        ("presence_penalty", 0.5),
        ("previous_response_id", "resp_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("response_format", {"type": "json_object"}),
        ("seed", 1),
        ("stop", ["."]),
        ("truncation", "auto"),
    ],
)
async def test_a_field_that_would_change_the_meaning_is_named(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, field: str, value: Any
) -> None:
    assert await refused(asking, **{field: value}) == (
        400,
        field,
        f"{field}: This field is not supported; leave it out",
    )
    assert fake_sidecar.hermes.requests == []


async def test_harmless_fields_are_ignored(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Yes.")]
    await answer(
        asking,
        background=False,
        conversation=None,
        include=["reasoning.encrypted_content"],
        max_tool_calls=3,
        parallel_tool_calls=True,
        presence_penalty=0,
        previous_response_id=None,
        prompt_cache_key="desk",
        reasoning={"effort": "low"},
        safety_identifier="trader-7",
        service_tier="auto",
        store=False,
        stream_options={"include_obfuscation": False},
        text={"verbosity": "low"},
        tool_choice=None,
        tools=None,
        truncation="disabled",
        user="desk",
    )
    assert requested(fake_sidecar).messages == [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "."}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
            "input[0].call_id",
        ),
        ({"input": "a\x00b"}, "input"),
        ({"input": [{"role": "user", "content": "a\x00b"}]}, "input[0].content"),
        ({"input": "x" * 200_000}, "input"),
        ({"input": [{"role": "user", "content": ""}] * 1025}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 257}]},
            "input[0].content",
        ),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"prompt_cache_key": "a" * 513}, "prompt_cache_key"),
        ({"safety_identifier": "a" * 65}, "safety_identifier"),
        ({"model": None}, "model"),
        ({"max_output_tokens": 15}, "max_output_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "no good"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
            "input",
        ),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "sell"}}, "tool_choice.name"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "tools": [{"type": "function", "name": "sell"}],
                }
            },
            "tool_choice.tools",
        ),
        ({"tools": [TOOL], "include": ["message.output_text.logprobs"]}, "include"),
    ],
)
async def test_bad_input_names_its_field(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, body: dict[str, Any], param: str
) -> None:
    status, named, _ = await refused(asking, **body)
    assert (status, named) == (400, param)
    assert fake_sidecar.hermes.requests == []


async def test_the_largest_fields_are_accepted(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [completion("Hold.")]
    echoed = {
        "metadata": {"a" * 64: "b" * 512},
        "prompt_cache_key": "a" * 512,
        "safety_identifier": "a" * 64,
    }
    parts = [{"type": "input_text", "text": ""}] * 256
    turns = [{"role": "user", "content": "a"}] * 1023 + [{"role": "user", "content": parts}]
    made = await answer(asking, input=turns, **echoed)
    assert {name: made[name] for name in echoed} == echoed


async def test_an_error_quotes_nothing(asking: httpx.AsyncClient) -> None:
    for body in (
        {"input": [{"type": "secret"}]},
        {"input": [{"role": "secret", "content": "."}]},
        {"tool_choice": "secret"},
        {"text": {"format": {"type": "secret"}}},
        {"metadata": {"secret": 1}},
        {"metadata": {"secret" * 11: "a"}},
        {"metadata": {"secret": "secret" * 100}},
    ):
        assert "secret" not in (await ask(asking, **body)).text


async def test_a_limit_is_named_as_this_path_names_it(asking: httpx.AsyncClient) -> None:
    assert await refused(asking, model="phi3", max_output_tokens=95) == (
        400,
        "max_output_tokens",
        "max_output_tokens: a proposal needs 96 tokens; send at least that",
    )
