"""A request of `/v1/responses` as a conversation, and as the response that it begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llm_sidecar.models.base import Message
from llm_sidecar.services.conversation import Conversation, Tool
from llm_sidecar.services.tools import ToolChoice
from osiris.openai.errors import bad_field
from osiris.openai.limits import check_chars, check_json
from osiris.openai.response_items import new_id
from osiris.openai.schemas.functions import NamedTool
from osiris.openai.schemas.input_items import FunctionCall, FunctionCallOutput, InputMessage
from osiris.openai.schemas.response_object import ResponseObject
from osiris.openai.schemas.response_tools import (
    AllowedTools,
    JsonObject,
    JsonSchema,
    PlainText,
)
from osiris.openai.schemas.responses import LOGPROBS, ResponseRequest
from osiris.openai.tool_input import Calls, choice_of, named_tools, tools_of


def conversation_of(body: ResponseRequest, max_chars: int) -> Conversation:
    """The conversation that a request asks to continue.

    Args:
        body: the request.
        max_chars: the longest chat, and the longest schema or tools as JSON, in characters.

    Raises:
        RequestValidationError: fields contradict each other, or something is too long.
    """
    tools, choice = _tools(body, max_chars)
    wants_logprobs = LOGPROBS in (body.include or ())
    if wants_logprobs and tools and choice != "none":
        raise bad_field("include", "Log probabilities are not supported with tools")
    messages, schema = _messages(body), _schema(body)
    check_chars("input", sum(len(message["content"]) for message in messages), max_chars)
    check_json("text.format.schema", schema, max_chars)
    return Conversation(
        messages,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        schema=schema,
        is_free_text=body.text is not None and isinstance(body.text.format, PlainText),
        tools=tools,
        tool_choice=choice,
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
    )


def response_of(body: ResponseRequest) -> ResponseObject:
    """The response before it has any output.

    Open Responses requires numbers where the request leaves the sampling to the model: they are 1,
    the default of OpenAI's API.
    """
    return ResponseObject(
        id=new_id("resp"),
        object="response",
        created_at=int(time.time()),
        completed_at=None,
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=None,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        presence_penalty=0,
        frequency_penalty=0,
        previous_response_id=None,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=None,
        safety_identifier=body.safety_identifier,
        service_tier="default",
        store=False,
        temperature=1 if body.temperature is None else body.temperature,
        text={"format": _format(body)},
        tool_choice=_tool_choice(body),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1 if body.top_p is None else body.top_p,
        truncation="disabled",
        usage=None,
    )


def _messages(body: ResponseRequest) -> list[Message]:
    messages: list[Message] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    calls = Calls()
    for number, item in enumerate(body.input):
        match item:
            case InputMessage():
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": item.content})
            case FunctionCall():
                text = calls.text(item.call_id, item.name, item.arguments)
                messages.append({"role": "assistant", "content": text})
            case FunctionCallOutput():
                param = f"input[{number}].call_id"
                messages.append(calls.result(item.call_id, item.output, param))
    if isinstance(body.input[-1], FunctionCall):
        raise bad_field("input", "A call should be followed by its result")
    if not messages:
        raise bad_field("input", "It has no turn to answer")
    return messages


def _schema(body: ResponseRequest) -> Mapping[str, Any] | None:
    match body.text and body.text.format:
        case JsonSchema() as wanted:
            return wanted.json_schema
        case JsonObject():
            return {"type": "object"}
    return None


def _tools(body: ResponseRequest, max_chars: int) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The functions that the model may call, and whether it must call one."""
    tools = tools_of(body.tools or (), max_chars)
    match body.tool_choice:
        case NamedTool() as named:
            return named_tools(tools, [named], "tool_choice.name"), "required"
        case AllowedTools() as allowed:
            return named_tools(tools, allowed.tools, "tool_choice.tools"), allowed.mode
        case mode:
            return tools, choice_of(mode, tools)


def _format(body: ResponseRequest) -> dict[str, Any]:
    match body.text and body.text.format:
        case JsonSchema() as wanted:
            return {
                "type": "json_schema",
                "name": wanted.name,
                # OpenAI's document has no null here, and Open Responses requires it.
                "description": wanted.description or "",
                "schema": wanted.json_schema,
                "strict": bool(wanted.strict),
            }
        case JsonObject():
            return {"type": "json_object"}
    return {"type": "text"}


def _tool_choice(body: ResponseRequest) -> Any:
    chosen = body.tool_choice
    return chosen.model_dump() if isinstance(chosen, NamedTool | AllowedTools) else chosen or "auto"
