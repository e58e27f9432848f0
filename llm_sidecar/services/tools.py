"""Tools of a chat: their description for the model, and the JSON schema of its answer.

The model writes a call as `{"name": ..., "arguments": {...}}`. If it may also answer without a
call, it writes `{"text": ...}`, or `{"answer": ...}` if the client wants an answer with a schema.
One schema with these alternatives works on every engine that has guided decoding, whatever format
of calls the model was trained on, and its answers can be read while they are generated.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from llm_sidecar.services.client_schemas import relocated

ToolChoice = Literal["none", "auto", "required"]
"""Whether the model must not call a tool, may call one, or must call one."""

_CALL: Final = 'one JSON object {"name": the function\'s name, "arguments": its arguments}'


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of letters, digits, `_` and `-`.
        description: for the model.
        parameters: JSON schema of the arguments, an object; None for a function without any.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


def instructions(tools: Sequence[Tool], choice: ToolChoice, *, has_schema: bool) -> str:
    """The instructions for the model: the functions, and how to call them.

    Args:
        tools: those that are offered.
        choice: `auto` or `required`.
        has_schema: whether an answer without a call has a schema.
    """
    if choice == "auto":
        other = '{"answer": the answer}' if has_schema else '{"text": the answer}'
        first = f"To call a function, answer with {_CALL}. Otherwise answer with {other}."
    else:
        first = f"Answer with the call of a function: {_CALL}."
    return "\n".join((first, "Functions:", *map(_described, tools)))


def answer_schema(
    tools: Sequence[Tool], choice: ToolChoice, schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The JSON schema of the whole answer.

    Args:
        tools: those that are offered.
        choice: `auto` or `required`.
        schema: of an answer without a call; None for text.
    """
    parts: dict[str, Mapping[str, Any]] = {}
    alternatives = []
    for number, tool in enumerate(tools):
        parameters = {"type": "object", **(tool.parameters or _NO_PARAMETERS)}
        arguments = _part(parameters, f"tool{number}", parts)
        alternatives.append(_object(name={"enum": [tool.name]}, arguments=arguments))
    if choice == "auto":
        if schema is None:
            alternatives.append(_object(text={"type": "string"}))
        else:
            alternatives.append(_object(answer=_part(schema, "answer", parts)))
    whole = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    return {**whole, "$defs": parts} if parts else whole


def call_text(name: str, arguments: str) -> str:
    """An earlier call in the assistant's turn, as the model writes it.

    Args:
        name: of the tool.
        arguments: JSON text; text that is not JSON stays as it is.
    """
    with contextlib.suppress(ValueError):
        arguments = json.dumps(json.loads(arguments), ensure_ascii=False, separators=(",", ":"))
    return f'{{"name":{json.dumps(name)},"arguments":{arguments}}}'


def result_text(name: str, result: str) -> str:
    """The result of an earlier call, as a user's turn."""
    return f"Result of {name}:\n{result}"


_NO_PARAMETERS: Final[Mapping[str, Any]] = {"properties": {}, "additionalProperties": False}


def _described(tool: Tool) -> str:
    shown: dict[str, Any] = {"name": tool.name}
    if tool.description:
        shown["description"] = tool.description
    shown["parameters"] = tool.parameters or _NO_PARAMETERS
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _part(
    schema: Mapping[str, Any], name: str, parts: dict[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """A schema for use inside another one. A schema that refers to itself moves into `parts`."""
    schema = {key: value for key, value in schema.items() if key != "$schema"}
    pointer = f"#/$defs/{name}"
    moved = relocated(schema, pointer)
    if moved == schema:
        return schema
    parts[name] = moved
    return {"$ref": pointer}
