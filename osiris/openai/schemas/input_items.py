"""The items of the input of `/v1/responses`: turns of the chat, calls and their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import MAX_TURNS, OpenAIModel
from osiris.openai.schemas.by_type import by_type
from osiris.openai.schemas.content import joined, schema
from osiris.openai.schemas.functions import NAME

_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
Content = Annotated[str, BeforeValidator(joined(_TEXTS)), WithJsonSchema(schema(_TEXTS))]


class InputMessage(OpenAIModel):
    """A turn of the chat."""

    type: Literal["message"] = Field(
        "message", description="`message`, which is the default", examples=["message"]
    )
    role: Literal["user", "assistant", "system", "developer"] = Field(
        description="whose turn it is: `user`, `assistant`, `system`, or `developer`, which is the "
        "same as `system`",
        examples=["user"],
    )
    content: Content = Field(
        description="a text, or a list of texts", examples=["AAPL: RSI 78, stop 2 %."]
    )


class FunctionCall(OpenAIModel):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"] = Field(
        description="always `function_call`", examples=["function_call"]
    )
    call_id: str = Field(min_length=1, description="the id of the call", examples=["call_1"])
    name: str = Field(pattern=NAME, description="the function", examples=["get_price"])
    arguments: str = Field(description="its arguments as JSON", examples=['{"ticker":"AAPL"}'])


class FunctionCallOutput(OpenAIModel):
    """The result of a function."""

    type: Literal["function_call_output"] = Field(
        description="always `function_call_output`", examples=["function_call_output"]
    )
    call_id: str = Field(
        min_length=1, description="the `call_id` of an earlier `function_call`", examples=["call_1"]
    )
    output: Content = Field(description="a text, or a list of texts", examples=["182.40"])


class ReasoningItem(OpenAIModel):
    """The reasoning of another model before an earlier answer; ignored."""

    type: Literal["reasoning"] = Field(description="always `reasoning`", examples=["reasoning"])


InputItem = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem
_by_kind = by_type(
    {
        "message": InputMessage,
        "function_call": FunctionCall,
        "function_call_output": FunctionCallOutput,
        "reasoning": ReasoningItem,
    },
    "Only items of type message, function_call, function_call_output and reasoning are supported",
    default="message",
)


def _item(value: object) -> object:
    if isinstance(value, Mapping) and value.get("type") == "item_reference":
        raise PydanticCustomError(
            "unsupported_value",
            "No items are stored, so none can be referenced; send the item itself, as clients do "
            "with store=false",
        )
    return _by_kind(value)


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


InputItems = Annotated[
    list[Annotated[InputItem, BeforeValidator(_item)]],
    Field(max_length=MAX_TURNS),
    BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
]
"""A list of items; a text is one turn of the user."""
