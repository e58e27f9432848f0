"""Questions about an input, and their answers: the Decisions API.

The fields are those of OpenAI's Python package 3.57 (`openai.types.decision`).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import OpenAIModel

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


_MASS: Final = (
    "not in OpenAI's API: the probability that the model answers with one of the options at all; "
    "the probabilities are normalised by it"
)
_RELIABLE: Final = (
    "not in OpenAI's API: `false` if the mass is below `MIN_ANSWER_MASS`: another answer is more "
    "likely, so do not use this one"
)
_CONFIDENCE: Final = (
    "how concentrated the probabilities are: 1 - entropy / log(number of options); not the "
    "probability that the answer is right"
)


class _Answer(BaseModel):
    name: str | None = Field(description="of the question", examples=["overbought"])


class _Measured(_Answer):
    answer_mass: float = Field(ge=0, le=1, description=_MASS, examples=[0.97])
    reliable: bool = Field(description=_RELIABLE, examples=[True])


class PredicateAnswer(_Measured):
    """The answer to a predicate."""

    type: Literal["predicate"] = Field(
        "predicate", description="always `predicate`", examples=["predicate"]
    )
    probability: float = Field(
        ge=0, le=1, description="that the statement is true", examples=[0.91]
    )


class ChoiceProbability(BaseModel):
    """An option and its probability."""

    value: str | bool = Field(description="the option", examples=["adjust"])
    probability: float = Field(ge=0, le=1, description="of the option", examples=[0.8])


class ChoiceAnswer(_Measured):
    """The answer to a choice."""

    type: Literal["choice"] = Field("choice", description="always `choice`", examples=["choice"])
    choice: str | bool = Field(description="the most likely option", examples=["adjust"])
    confidence: float = Field(ge=0, le=1, description=_CONFIDENCE, examples=[0.28])
    probabilities: list[ChoiceProbability] = Field(
        description="of all options, in their order",
        examples=[[{"value": "adjust", "probability": 0.8}, {"value": "pass", "probability": 0.2}]],
    )


class LevelProbability(BaseModel):
    """A level and its probability."""

    value: int = Field(ge=0, description="the index of the level, from 0", examples=[1])
    label: str = Field(description="the level", examples=["Good"])
    probability: float = Field(ge=0, le=1, description="of the level", examples=[0.8])


class ScoreAnswer(_Measured):
    """The answer to a score."""

    type: Literal["score"] = Field("score", description="always `score`", examples=["score"])
    score: float = Field(
        ge=0,
        description="the mean of the indexes of the levels, weighted by their probabilities",
        examples=[0.8],
    )
    confidence: float = Field(ge=0, le=1, description=_CONFIDENCE, examples=[0.28])
    probabilities: list[LevelProbability] = Field(
        description="of all levels, in their order",
        examples=[
            [
                {"value": 0, "label": "Poor", "probability": 0.2},
                {"value": 1, "label": "Good", "probability": 0.8},
            ]
        ],
    )


class RefusalAnswer(_Answer):
    """Every option has probability 0."""

    type: Literal["refusal"] = Field(
        "refusal", description="always `refusal`", examples=["refusal"]
    )


class DecisionInputDetails(BaseModel):
    """The cached part of the input."""

    cached_tokens: int = Field(
        description="input tokens that were not processed, because another prompt begins with them",
        examples=[96],
    )
    cache_write_tokens: int = Field(0, description="always 0", examples=[0])


class DecisionOutputDetails(BaseModel):
    """The parts of the output, always 0."""

    reasoning_tokens: int = Field(0, description="always 0", examples=[0])


class DecisionUsage(BaseModel):
    """The tokens of a request."""

    input_tokens: int = Field(
        description="tokens of all prompts: of each question with the input", examples=[128]
    )
    input_tokens_details: DecisionInputDetails = Field(
        description="what the cache saved",
        examples=[{"cached_tokens": 96, "cache_write_tokens": 0}],
    )
    output_tokens: int = Field(0, description="always 0: no text is generated", examples=[0])
    output_tokens_details: DecisionOutputDetails = Field(
        DecisionOutputDetails(reasoning_tokens=0),
        description="always the same",
        examples=[{"reasoning_tokens": 0}],
    )
    total_tokens: int = Field(description="the same as `input_tokens`", examples=[128])


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer


class Decision(BaseModel):
    """The answers to all questions."""

    model: str = Field(description="as in the request", examples=["hermes"])
    answers: list[Answer] = Field(
        description="in the order of the questions",
        examples=[
            [
                {
                    "type": "predicate",
                    "name": "overbought",
                    "probability": 0.91,
                    "answer_mass": 0.97,
                    "reliable": True,
                }
            ]
        ],
    )
    usage: DecisionUsage = Field(
        description="the tokens of the request",
        examples=[
            {
                "input_tokens": 128,
                "input_tokens_details": {"cached_tokens": 96, "cache_write_tokens": 0},
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 128,
            }
        ],
    )
