"""Requests of chats."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import MAX_TURNS, OpenAIModel
from osiris.openai.schemas.content import joined, schema
from osiris.openai.schemas.functions import Function, NamedTool
from osiris.openai.schemas.sampling import PENALTIES, SampledRequest

MAX_TOP_LOGPROBS: Final = 20
_TEXTS: Final = {"text": "text", "refusal": "refusal"}
Content = Annotated[
    str | None,
    BeforeValidator(joined(_TEXTS)),
    WithJsonSchema({"anyOf": [*schema(_TEXTS)["anyOf"], {"type": "null"}]}),
]


class CalledFunction(OpenAIModel):
    """The function of an earlier call."""

    name: str = Field(description="its name", examples=["price_of"])
    arguments: str = Field(description="its arguments, as JSON", examples=['{"ticker":"AAPL"}'])


class ToolCall(OpenAIModel):
    """An earlier call."""

    id: str = Field(description="what the call's result refers to", examples=["call_1"])
    type: Literal["function"] = Field(
        "function", description="always `function`", examples=["function"]
    )
    function: CalledFunction = Field(
        description="what was called",
        examples=[{"name": "price_of", "arguments": '{"ticker":"AAPL"}'}],
    )


class ChatMessage(OpenAIModel):
    """A turn of the chat."""

    unsupported: ClassVar = {"audio": (), "function_call": ()}

    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="whose turn it is: `system`, or `developer`, which is the same; `user`; "
        "`assistant`; or `tool`, the result of a call",
        examples=["user"],
    )
    content: Content = Field(
        None, description="the text, or parts of text", examples=["We are long NVDA. What now?"]
    )
    tool_calls: list[ToolCall] | None = Field(
        None,
        max_length=128,
        description="what the assistant has called",
        examples=[
            [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "price_of", "arguments": '{"ticker":"AAPL"}'},
                }
            ]
        ],
    )
    tool_call_id: str | None = Field(
        None, description="the call whose result this is", examples=["call_1"]
    )


class ChatTool(OpenAIModel):
    """A tool."""

    type: Literal["function"] = Field(
        description="`function`: there is no other kind", examples=["function"]
    )
    function: Function = Field(description="the function", examples=[{"name": "price_of"}])


def _choice(value: object) -> object:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name)}}:
            return NamedTool(type="function", name=name)
    raise PydanticCustomError(
        "unsupported_value", "Input should be 'none', 'auto', 'required' or a function"
    )


ToolChoiceField = Annotated[
    Literal["none", "auto", "required"] | NamedTool | None,
    BeforeValidator(_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "enum": ["function"]},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "function"],
                },
                {"type": "null"},
            ]
        }
    ),
]


class ResponseFormat(OpenAIModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`; `json_object`: any JSON object; `json_schema`: see `json_schema`",
        examples=["json_schema"],
    )
    json_schema: dict[str, Any] | None = Field(
        None,
        description="`schema`, a JSON schema, which the answer always follows, and its `name`; "
        "`strict` has no effect",
        examples=[{"name": "answer", "schema": {"type": "object"}}],
    )


class ChatRequest(SampledRequest):
    """A chat to answer."""

    unsupported: ClassVar = {
        **PENALTIES,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MAX_TURNS,
        description="the turns, oldest first; the answer continues a last turn of the assistant's",
        examples=[[{"role": "user", "content": "We are long NVDA. What now?"}]],
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None,
        description="the maximum number of new tokens; null for 1,024, or what the model's context "
        "leaves",
        examples=[256],
    )
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None, description="the older name of `max_completion_tokens`", examples=[256]
    )
    response_format: ResponseFormat | None = Field(
        None, description="the form of the answer", examples=[{"type": "json_object"}]
    )
    tools: list[ChatTool] | None = Field(
        None,
        max_length=128,
        description="the functions that the model may call",
        examples=[[{"type": "function", "function": {"name": "price_of"}}]],
    )
    tool_choice: ToolChoiceField = Field(
        None,
        description="`none`: no call; `auto`: the model decides; `required`: one call; or the "
        "function to call. `auto` for null, if there are tools",
        examples=["auto"],
    )
    parallel_tool_calls: bool | None = Field(
        None, description="has no effect: an answer has at most one call", examples=[False]
    )
    logprobs: bool | None = Field(
        None, description="whether each token comes with its log probability", examples=[True]
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None,
        description="how many of the most likely tokens each token comes with; needs `logprobs`",
        examples=[3],
    )
