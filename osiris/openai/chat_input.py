"""The conversation that a request of `/v1/chat/completions` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_sidecar.models.base import Message
from llm_sidecar.services.conversation import Conversation, Tool
from llm_sidecar.services.tools import ToolChoice
from osiris.openai.errors import bad_field
from osiris.openai.limits import check_chars, check_json
from osiris.openai.schemas.chat import ChatMessage, ChatRequest
from osiris.openai.schemas.functions import NamedTool
from osiris.openai.tool_input import Calls, choice_of, named_tools, tools_of


def conversation_of(body: ChatRequest, max_chars: int) -> Conversation:
    """The conversation of a request, with the seed of its first choice.

    Args:
        body: the request.
        max_chars: the longest chat, and the longest schema or tools as JSON, in characters.

    Raises:
        RequestValidationError: a field is not valid beside the others, or too long.
    """
    messages = _messages(body.messages)
    check_chars("messages", sum(len(message["content"]) for message in messages), max_chars)
    tools, tool_choice = _tools(body, max_chars)
    return Conversation(
        messages,
        max_tokens=_max_tokens(body),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed_of(0),
        stop=tuple(body.stop),
        schema=_schema(body, max_chars),
        is_free_text=body.response_format is not None and body.response_format.type == "text",
        tools=tools,
        tool_choice=tool_choice,
        logprobs=_logprobs(body),
    )


def _messages(sent: list[ChatMessage]) -> list[Message]:
    calls, messages = Calls(), list[Message]()
    for number, message in enumerate(sent):
        text = message.content or ""
        if message.role == "tool":
            param = f"messages[{number}].tool_call_id"
            messages.append(calls.result(message.tool_call_id or "", text, param))
        elif message.role == "assistant":
            texts = [text] if text else []
            texts += (
                calls.text(call.id, call.function.name, call.function.arguments)
                for call in message.tool_calls or ()
            )
            messages.append({"role": "assistant", "content": "\n".join(texts)})
        else:
            role = "user" if message.role == "user" else "system"
            messages.append({"role": role, "content": text})
    if sent[-1].tool_calls:
        raise bad_field("messages", "A call should be followed by its result")
    return messages


def _max_tokens(body: ChatRequest) -> int | None:
    limits = body.max_completion_tokens, body.max_tokens
    if None not in limits and limits[0] != limits[1]:
        raise bad_field("max_tokens", "It should not differ from max_completion_tokens")
    return body.max_tokens if limits[0] is None else limits[0]


def _schema(body: ChatRequest, max_chars: int) -> Mapping[str, Any] | None:
    if body.response_format is None or body.response_format.type == "text":
        return None
    if body.response_format.type == "json_object":
        return {"type": "object"}
    schema = (body.response_format.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise bad_field("response_format.json_schema.schema", "It should be an object", "dict_type")
    check_json("response_format", schema, max_chars)
    return schema


def _tools(body: ChatRequest, max_chars: int) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The functions that the model may call, and whether it must call one."""
    tools = tools_of([tool.function for tool in body.tools or ()], max_chars)
    if isinstance(body.tool_choice, NamedTool):
        return named_tools(tools, [body.tool_choice], "tool_choice"), "required"
    return tools, choice_of(body.tool_choice, tools)


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise bad_field("top_logprobs", "It needs logprobs: true")
    return None
