"""The tools of a request of `/v1/responses`, and the format of the answer."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from osiris.openai.schemas.base import OpenAIModel
from osiris.openai.schemas.by_type import by_type
from osiris.openai.schemas.functions import NAME, Function, NamedTool


class FunctionTool(Function):
    """A tool: a function."""

    type: Literal["function"] = Field(description="always `function`", examples=["function"])


_ONLY_FUNCTIONS: Final = "Only tools of type function are supported"
Tool = Annotated[
    FunctionTool, BeforeValidator(by_type({"function": FunctionTool}, _ONLY_FUNCTIONS))
]
_Named = Annotated[NamedTool, BeforeValidator(by_type({"function": NamedTool}, _ONLY_FUNCTIONS))]


class AllowedTools(OpenAIModel):
    """Some of the functions."""

    type: Literal["allowed_tools"] = Field(
        description="always `allowed_tools`", examples=["allowed_tools"]
    )
    mode: Literal["auto", "required"] = Field(
        "auto",
        description="`auto`: the model decides whether it calls one; `required`: it has to",
        examples=["auto"],
    )
    tools: list[_Named] = Field(
        min_length=1,
        max_length=128,
        description="the functions that it may call",
        examples=[[{"type": "function", "name": "get_price"}]],
    )


_chosen_tool = by_type(
    {"function": NamedTool, "allowed_tools": AllowedTools},
    "Input should be none, auto, required, or an object of type function or allowed_tools",
)


def _choice(value: object) -> object:
    return value if value in (None, "none", "auto", "required") else _chosen_tool(value)


ChosenTool = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedTools | None, BeforeValidator(_choice)
]


class PlainText(OpenAIModel):
    """Free text, also from phi3."""

    type: Literal["text"] = Field(description="always `text`", examples=["text"])


class JsonObject(OpenAIModel):
    """Any JSON object."""

    type: Literal["json_object"] = Field(
        description="always `json_object`", examples=["json_object"]
    )


class JsonSchema(OpenAIModel):
    """JSON that follows a schema."""

    type: Literal["json_schema"] = Field(
        description="always `json_schema`", examples=["json_schema"]
    )
    name: str = Field(pattern=NAME, description="the name of the format", examples=["stop"])
    json_schema: dict[str, Any] = Field(
        alias="schema",
        description="the schema",
        examples=[{"type": "object", "properties": {"stop": {"type": "number"}}}],
    )
    description: str | None = Field(
        None, description="what it is for; ignored", examples=["The new stop."]
    )
    strict: bool | None = Field(
        None, description="ignored: the answer always follows the schema", examples=[True]
    )


_a_format = by_type(
    {"text": PlainText, "json_object": JsonObject, "json_schema": JsonSchema},
    "Input should be an object of type text, json_object or json_schema",
)


class TextConfig(OpenAIModel):
    """How the text of the answer looks."""

    format: Annotated[
        PlainText | JsonObject | JsonSchema | None,
        BeforeValidator(lambda value: value if value is None else _a_format(value)),
    ] = Field(
        None,
        description="its format; phi3 writes a proposal if there is none and the request has no "
        "tools",
        examples=[{"type": "json_object"}],
    )
