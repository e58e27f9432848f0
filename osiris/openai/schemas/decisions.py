"""Questions about an input: the request of the Decisions API.

The fields are those of OpenAI's Python package 3.57 (`openai.types.decision`).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import MAX_NAME, OpenAIModel

MAX_QUESTIONS: Final = 64
"""OpenAI allows 400. Each question is a forward pass over its own tokens, which is slow on a CPU. A
second request about the same input finds it in the cache. So two requests take as long as one with
all questions, and other requests run between them."""
MAX_ITEMS: Final = 256
"""Maximum number of messages, calls and outputs in an input."""

_NAME: Final = "any name, which the answer repeats; names need not differ"


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class DecisionPart(OpenAIModel):
    """A part of a text."""

    type: Literal["input_text", "output_text", "refusal", "input_json", "input_image"] = Field(
        description="`input_text`, `output_text`, `refusal` or `input_json`; an image, "
        "`input_image`, is refused, because the models read text only",
        examples=["input_text"],
    )
    text: str = Field("", description="of a text", examples=["Long ABC from 100, now 112.5."])
    refusal: str = Field("", description="of a refusal", examples=["I cannot say."])
    data: dict[str, Any] | list[dict[str, Any]] | None = Field(
        None,
        description="of JSON: an object, or an array of objects",
        examples=[{"ticker": "ABC", "rsi": 81}],
    )

    @model_validator(mode="after")
    def _check(self) -> DecisionPart:
        if self.type == "input_image":
            raise PydanticCustomError(
                "unsupported_value", "Images are not supported; the models read text only"
            )
        if self.type == "input_json" and self.data is None:
            raise PydanticCustomError("missing", "A part with JSON needs `data`")
        return self


DecisionParts = Annotated[
    list[DecisionPart],
    Field(min_length=1, max_length=MAX_ITEMS),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[DecisionPart]),
]
"""A text, or a list of parts."""


class DecisionItem(OpenAIModel):
    """A message, a function call, or the output of one."""

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    ] = Field(
        "message",
        description="`message`, `function_call`, `function_call_output`, `custom_tool_call` or "
        "`custom_tool_call_output`",
        examples=["message"],
    )
    role: Literal["user", "assistant", "system", "developer"] | None = Field(
        None,
        description="of a message: `user`, `assistant`, `system` or `developer`",
        examples=["user"],
    )
    content: DecisionParts | None = Field(
        None, description="of a message", examples=["Long ABC from 100, now 112.5."]
    )
    call_id: str | None = Field(
        None, description="of a call and its output", examples=["call_1"], min_length=1
    )
    name: str | None = Field(None, description="of a call's function", examples=["quote"])
    arguments: str | None = Field(
        None, description="of a function call, as JSON", examples=['{"ticker":"ABC"}']
    )
    input: str | None = Field(None, description="of a custom tool call", examples=["ABC"])
    output: DecisionParts | None = Field(None, description="of a call", examples=["112.5"])

    @model_validator(mode="after")
    def _check(self) -> DecisionItem:
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", f"An item of this type needs `{name}`")
        return self


_NEEDED: Final = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
}


def _text_or_boolean(value: object) -> object:
    if not isinstance(value, str | bool):
        # One error; a union would give one for each of its types.
        raise PydanticCustomError("choice_type", "Input should be a string or a boolean")
    return value


ChoiceValue = Annotated[str | bool, BeforeValidator(_text_or_boolean)]


class DecisionOption(OpenAIModel):
    """An option of a choice."""

    value: ChoiceValue = Field(
        description="a string or a boolean; all options differ", examples=["adjust"]
    )
    description: str = Field(
        "", description="when it applies; optional", examples=["Move the stop."]
    )


class DecisionLevel(OpenAIModel):
    """A level of a score."""

    label: str = Field(description="its name", examples=["Poor"], min_length=1)
    description: str = Field(
        "", description="when it applies; optional", examples=["The stop is wider than the gain."]
    )


class DecisionQuestion(OpenAIModel):
    """A question about the input."""

    type: Literal["predicate", "choice", "score"] = Field(
        description="`predicate`: how likely a statement is true; `choice`: which option fits; "
        "`score`: which of the ordered levels fits",
        examples=["predicate"],
    )
    instructions: DecisionParts = Field(
        description="the statement, or what to choose or to rate: text or JSON",
        examples=["The position is overbought."],
    )
    name: str | None = Field(None, description=_NAME, examples=["overbought"])
    choices: list[DecisionOption] | None = Field(
        None,
        min_length=2,
        max_length=255,
        description="the options of a choice, and of nothing else",
        examples=[[{"value": "adjust"}, {"value": "pass"}]],
    )
    levels: list[DecisionLevel] | None = Field(
        None,
        min_length=2,
        max_length=10,
        description="the levels of a score, from the lowest to the highest, and of nothing else",
        examples=[[{"label": "Poor"}, {"label": "Good"}]],
    )

    @field_validator("choices")
    @classmethod
    def _check_values(cls, value: list[DecisionOption] | None) -> list[DecisionOption] | None:
        # A string and a boolean with the same text are different values.
        values = {(type(option.value), option.value) for option in value or ()}
        if len(values) < len(value or ()):
            raise PydanticCustomError("repeated_value", "Each option should have a different value")
        return value

    @model_validator(mode="after")
    def _check_options(self) -> DecisionQuestion:
        for kind, name in (("choice", "choices"), ("score", "levels")):
            if (self.type == kind) != (getattr(self, name) is not None):
                needs = "needs" if self.type == kind else "takes no"
                raise PydanticCustomError(
                    "wrong_options", f"A question of this type {needs} `{name}`"
                )
        return self


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class DecisionRequest(OpenAIModel):
    """Questions about an input."""

    known_keys = frozenset(
        name
        for model in (DecisionPart, DecisionItem, DecisionQuestion, DecisionOption, DecisionLevel)
        for name in model.model_fields
    )

    model: str = Field(
        max_length=MAX_NAME,
        description="`phi3`, `hermes`, or `phi3:` and the name of the adapter in use",
        examples=["hermes"],
    )
    input: Annotated[
        list[DecisionItem],
        Field(min_length=1, max_length=MAX_ITEMS),
        BeforeValidator(_as_items, json_schema_input_type=str | list[DecisionItem]),
    ] = Field(
        description="what the questions are about: a text, or messages and calls",
        examples=["Long ABC from 100, now 112.5, RSI 81."],
    )
    questions: list[DecisionQuestion] = Field(
        min_length=1,
        max_length=MAX_QUESTIONS,
        description="the questions; their order is that of the answers",
        examples=[[{"type": "predicate", "instructions": "The position is overbought."}]],
    )

    @field_validator("input")
    @classmethod
    def _check_outputs(cls, value: list[DecisionItem]) -> list[DecisionItem]:
        calls = {
            (f"{item.type}_output", item.call_id) for item in value if item.type.endswith("_call")
        }
        for item in value:
            if item.type.endswith("_output") and (item.type, item.call_id) not in calls:
                raise PydanticCustomError(
                    "unknown_call", "An output should have the `call_id` of a call in the input"
                )
        return value
