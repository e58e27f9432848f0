"""The conversation that a chat request asks for."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from llm_sidecar.services.conversation import Conversation, Tool
from osiris.openai.chat_input import conversation_of
from osiris.openai.schemas.chat import ChatRequest

TURNS = [{"role": "user", "content": "What now?"}]
PRICE = {"name": "price_of", "description": "The price.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": function} for function in (PRICE, {"name": "none"})]
PRICE_TOOL = Tool("price_of", "The price.", {"type": "object"})


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def conversation(max_chars: int = 1000, **fields: Any) -> Conversation:
    body = ChatRequest.model_validate({"model": "hermes", "messages": TURNS, **fields})
    return conversation_of(body, max_chars)


def fault(max_chars: int = 1000, **fields: Any) -> tuple[str, str]:
    """The field and the message of the error."""
    with pytest.raises(RequestValidationError) as caught:
        conversation(max_chars, **fields)
    (error,) = caught.value.errors()
    assert error["loc"][0] == "body"
    return error["loc"][1], error["msg"]


def test_each_field_has_its_place() -> None:
    assert conversation(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=3,
        stop=["END", "."],
        response_format=form({"type": "array"}),
        tools=TOOLS,
        tool_choice="auto",
        logprobs=True,
        top_logprobs=2,
    ) == Conversation(
        TURNS,
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=3,
        stop=("END", "."),
        schema={"type": "array"},
        tools=(PRICE_TOOL, Tool("none")),
        tool_choice="auto",
        logprobs=2,
    )


def test_a_request_without_options_has_the_defaults() -> None:
    assert conversation() == Conversation(TURNS)


@pytest.mark.parametrize(
    ("wanted", "schema", "is_free_text"),
    [
        (None, None, False),
        ({"type": "text"}, None, True),
        ({"type": "json_object"}, {"type": "object"}, False),
    ],
)
def test_the_response_format_decides_the_schema(
    wanted: Any, schema: Any, is_free_text: bool
) -> None:
    made = conversation(response_format=wanted)
    assert (made.schema, made.is_free_text) == (schema, is_free_text)


@pytest.mark.parametrize(
    ("choice", "tools", "mode"),
    [
        (None, (PRICE_TOOL, Tool("none")), "auto"),
        ("none", (PRICE_TOOL, Tool("none")), "none"),
        ("required", (PRICE_TOOL, Tool("none")), "required"),
        ({"type": "function", "function": {"name": "price_of"}}, (PRICE_TOOL,), "required"),
        # A function may have the name of a mode.
        ({"type": "function", "function": {"name": "none"}}, (Tool("none"),), "required"),
    ],
)
def test_the_chosen_function_is_the_only_one(choice: Any, tools: Any, mode: str) -> None:
    made = conversation(tools=TOOLS, tool_choice=choice)
    assert (made.tools, made.tool_choice) == (tools, mode)


def test_each_turn_becomes_a_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "price_of", "arguments": "{ }"}}
    sent: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "c"}]},
        {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "182.40"},
        {"role": "user"},
    ]
    assert conversation(messages=sent).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": 'One moment.\n{"name":"price_of","arguments":{}}'},
        {"role": "user", "content": "Result of price_of:\n182.40"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"messages": [{"role": "tool", "content": "1"}]},
            "messages[0].tool_call_id",
            "It should be the id of an earlier call",
        ),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_tokens",
            "It should not differ from max_completion_tokens",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "It should be an object",
        ),
        (
            {"tools": [TOOLS[0], TOOLS[0]]},
            "tools",
            "Two functions should not have the same name",
        ),
        ({"tool_choice": "required"}, "tool_choice", "It needs tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "auto"}}},
            "tool_choice",
            "It should name functions of tools",
        ),
        ({"top_logprobs": 1}, "top_logprobs", "It needs logprobs: true"),
    ],
)
def test_a_field_that_does_not_fit_the_others_is_named(
    fields: dict[str, Any], param: str, message: str
) -> None:
    assert fault(**fields) == (param, message)


def test_a_last_call_needs_its_result() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "tool_calls": [call]}
    assert fault(messages=[turn]) == ("messages", "A call should be followed by its result")


@pytest.mark.parametrize(
    ("fields", "param", "chars"),
    [
        ({"messages": [*TURNS, *TURNS]}, "messages", 2 * len("What now?")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"a": "é" * 20}},
                }
            },
            "response_format",
            len('{"a":""}') + 20,
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools",
            len('[{"name":"f","description":null,"parameters":null,"strict":true}]'),
        ),
    ],
)
def test_the_chat_the_schema_and_the_tools_are_bounded(
    fields: dict[str, Any], param: str, chars: int
) -> None:
    conversation(chars, **fields)
    message = f"Text is too long; MAX_PROMPT_CHARS takes {chars - 1} characters"
    assert fault(chars - 1, **fields) == (param, message)
