"""The functions of a request, those that its `tool_choice` names, and the calls in its chat."""

from __future__ import annotations

from collections.abc import Sequence

from llm_sidecar.models.base import Message
from llm_sidecar.services.tools import Tool, ToolChoice, call_text, result_text
from osiris.openai.errors import bad_field
from osiris.openai.limits import check_json
from osiris.openai.schemas.functions import Function, NamedTool


def tools_of(functions: Sequence[Function], max_chars: int) -> tuple[Tool, ...]:
    """The functions of a request.

    Args:
        functions: as sent.
        max_chars: the maximum number of characters of all of them as JSON.

    Raises:
        RequestValidationError: they are too long, or two have the same name.
    """
    check_json("tools", [function.model_dump() for function in functions], max_chars)
    if len({function.name for function in functions}) < len(functions):
        raise bad_field("tools", "Two functions should not have the same name")
    return tuple(
        Tool(function.name, function.description or "", function.parameters)
        for function in functions
    )


def named_tools(tools: Sequence[Tool], chosen: Sequence[NamedTool], param: str) -> tuple[Tool, ...]:
    """The functions with these names.

    Raises:
        RequestValidationError: names `param`, because one of them is unknown.
    """
    names = {tool.name for tool in chosen}
    if names - {tool.name for tool in tools}:
        raise bad_field(param, "It should name functions of tools")
    return tuple(tool for tool in tools if tool.name in names)


def choice_of(mode: ToolChoice | None, tools: Sequence[Tool]) -> ToolChoice:
    """Whether the model must call a function.

    Raises:
        RequestValidationError: it must, but there are none.
    """
    if mode == "required" and not tools:
        raise bad_field("tool_choice", "It needs tools")
    return mode or "auto"


class Calls:
    """The calls in a chat, as the model reads them."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def text(self, call_id: str, name: str, arguments: str) -> str:
        """A call in a turn of the assistant."""
        self._names[call_id] = name
        return call_text(name, arguments)

    def result(self, call_id: str, text: str, param: str) -> Message:
        """The turn with the result of a call.

        Raises:
            RequestValidationError: names `param`, because there is no earlier call with this id.
        """
        name = self._names.get(call_id)
        if name is None:
            raise bad_field(param, "It should be the id of an earlier call")
        return {"role": "user", "content": result_text(name, text)}
