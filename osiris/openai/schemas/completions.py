"""Completions: texts to continue."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.sampling import PENALTIES, SampledRequest, Usage

MAX_PROMPTS: Final = 128
_LARGEST_TOKEN: Final = (1 << 31) - 1
_TOKENS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

Prompt = str | list[int]
"""A text, or its tokens."""


def _is_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(one) is int and 0 <= one <= _LARGEST_TOKEN for one in value)
    )


def _prompts(value: object) -> list[Prompt]:
    """The list of prompts, from any of its forms."""
    prompts: list[Any] = [value] if isinstance(value, str) or _is_tokens(value) else []
    if not prompts and isinstance(value, list):
        prompts = value
    if not prompts or not all((isinstance(one, str) and one) or _is_tokens(one) for one in prompts):
        raise PydanticCustomError(
            "prompt_type",
            "Input should be a text, a list of tokens, or a list of these, none of them empty",
        )
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", f"List should have at most {MAX_PROMPTS} prompts")
    return prompts


Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(SampledRequest):
    """Texts to continue."""

    unsupported: ClassVar = {**PENALTIES, "best_of": (0, 1), "suffix": ("",)}

    prompt: Prompts = Field(
        description="a text, its tokens, or a list of up to 128 of one of them",
        examples=["AAPL is a stock of"],
    )
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(
        None,
        description="the maximum number of new tokens; 16 for null; 0 is allowed with `echo`",
        examples=[16],
    )
    echo: bool | None = Field(
        None, description="whether the text begins with the prompt", examples=[True]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="how many of the most likely tokens each token comes with; with `echo` also "
        "those of the prompt",
        examples=[1],
    )


class LegacyLogprobs(BaseModel):
    """The log probabilities of a text; the lists have one entry for each token."""

    tokens: list[str] = Field(description="the tokens as text", examples=[[" Apple"]])
    token_logprobs: list[float | None] = Field(
        description="the natural logarithm of each probability; null for the first token of a "
        "prompt",
        examples=[[-0.31]],
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="the most likely tokens and the token itself; null for the first token of a "
        "prompt",
        examples=[[{" Apple": -0.31}]],
    )
    text_offset: list[int] = Field(
        description="where each token begins in the text, in characters; one that is not in the "
        "text, such as a control token, begins where the next one does",
        examples=[[18]],
    )


class CompletionChoice(BaseModel):
    """One text."""

    index: int = Field(
        description="its number: those of the first prompt come first", examples=[0], ge=0
    )
    text: str = Field(description="the text", examples=[" Apple."])
    logprobs: LegacyLogprobs | None = Field(
        None,
        description="the log probabilities of its tokens; null unless requested",
        examples=[None],
    )
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: the model has ended it; `length`: it was truncated",
        examples=["length"],
    )


class CompletionAnswer(BaseModel):
    """The continued texts."""

    id: str = Field(description="of this answer", examples=["cmpl-5f0c"])
    object: Literal["text_completion"] = Field(
        description="always `text_completion`", examples=["text_completion"]
    )
    created: int = Field(description="when, in seconds since 1970", examples=[1769853600])
    model: str = Field(description="as the request names it", examples=["hermes"])
    choices: list[CompletionChoice] = Field(
        description="the texts",
        examples=[[{"index": 0, "text": " Apple.", "logprobs": None, "finish_reason": "length"}]],
    )
    usage: Usage = Field(
        description="the numbers of tokens",
        examples=[
            {
                "prompt_tokens": 6,
                "completion_tokens": 16,
                "total_tokens": 22,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
        ],
    )
