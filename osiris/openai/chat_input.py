"""The conversation that a request of `/v1/chat/completions` asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm_sidecar.models.base import Message
from llm_sidecar.services.conversation import Conversation, Tool
from llm_sidecar.services.tools import call_text, result_text
from osiris.openai.errors import bad_field
from osiris.openai.schemas.chat import ChatMessage, ChatRequest


def conversation_of(body: ChatRequest, max_chars: int) -> Conversation:
    """The conversation of a request, with the seed of its first choice.

    Args:
        body: the request.
        max_chars: the longest chat, and the longest schema or tools as JSON, in characters.

    Raises:
        RequestValidationError: a field is not valid beside the others, or too long.
    """
    messages = _messages(body.messages)
    check_chars("messages", sum(len(one["content"]) for one in messages), max_chars)
    tools = _tools(body, max_chars)
    return Conversation(
        messages,
        _max_tokens(body),
        body.temperature,
        body.top_p,
        body.seed_of(0),
        tuple(body.stop),
        _schema(body, max_chars),
        body.response_format is not None and body.response_format.type == "text",
        tools,
        _tool_choice(body, tools),
        _logprobs(body),
    )


def check_chars(param: str, chars: int, max_chars: int) -> None:
    """Raises RequestValidationError if a field has more than MAX_PROMPT_CHARS characters."""
    if chars > max_chars:
        raise bad_field(
            param,
            f"Text is too long; MAX_PROMPT_CHARS takes {max_chars} characters",
            "string_too_long",
        )


def check_json(param: str, value: object, max_chars: int) -> None:
    """Raises RequestValidationError if a value has more characters as JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    check_chars(param, len(text), max_chars)


def _messages(sent: list[ChatMessage]) -> list[Message]:
    names: dict[str, str] = {}
    messages: list[Message] = []
    for number, message in enumerate(sent):
        text = message.content or ""
        if message.role == "tool":
            name = names.get(message.tool_call_id or "")
            if name is None:
                param = f"messages[{number}].tool_call_id"
                raise bad_field(param, "It should be the id of an earlier call")
            messages.append({"role": "user", "content": result_text(name, text)})
        elif message.role == "assistant":
            messages.append({"role": "assistant", "content": _assistant_text(message, names)})
        else:
            role = "user" if message.role == "user" else "system"
            messages.append({"role": role, "content": text})
    if sent[-1].tool_calls:
        raise bad_field("messages", "A call should be followed by its result")
    return messages


def _assistant_text(message: ChatMessage, names: dict[str, str]) -> str:
    """The text of a turn with its calls, whose names are added to `names`."""
    texts = [message.content] if message.content else []
    for call in message.tool_calls or ():
        names[call.id] = call.function.name
        texts.append(call_text(call.function.name, call.function.arguments))
    return "\n".join(texts)


def _max_tokens(body: ChatRequest) -> int | None:
    both = body.max_completion_tokens, body.max_tokens
    if None not in both and both[0] != both[1]:
        raise bad_field("max_tokens", "It should not differ from max_completion_tokens")
    return body.max_tokens if both[0] is None else both[0]


def _schema(body: ChatRequest, max_chars: int) -> Mapping[str, Any] | None:
    if body.response_format is None or body.response_format.type == "text":
        return None
    if body.response_format.type == "json_object":
        return {"type": "object"}
    found = (body.response_format.json_schema or {}).get("schema")
    if not isinstance(found, dict):
        raise bad_field("response_format.json_schema.schema", "It should be an object", "dict_type")
    check_json("response_format", found, max_chars)
    return found


def _tools(body: ChatRequest, max_chars: int) -> tuple[Tool, ...]:
    sent = [tool.function for tool in body.tools or ()]
    check_json("tools", [one.model_dump() for one in sent], max_chars)
    if len({one.name for one in sent}) < len(sent):
        raise bad_field("tools", "Two functions should not have the same name")
    return tuple(Tool(one.name, one.description or "", one.parameters) for one in sent)


def _tool_choice(body: ChatRequest, tools: tuple[Tool, ...]) -> str:
    choice = body.tool_choice or "auto"
    if choice in ("none", "auto"):
        return choice
    if choice == "required":
        if not tools:
            raise bad_field("tool_choice", "It needs tools")
        return choice
    name = choice.removeprefix("=")
    if all(tool.name != name for tool in tools):
        raise bad_field("tool_choice", "It should name one of the tools")
    return name


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise bad_field("top_logprobs", "It needs logprobs: true")
    return None
