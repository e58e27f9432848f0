"""The request of `/v1/responses`.

`openresponses_types` has the types of the answer, but not of the request: its model drops the
parameters of a tool, and its errors quote what a client sent.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import MAX_NAME, OpenAIModel
from osiris.openai.schemas.input_items import InputItems
from osiris.openai.schemas.response_tools import ChosenTool, TextConfig, Tool
from osiris.openai.schemas.sampling import PENALTIES

MAX_OUTPUT_TOKENS: Final = 1 << 20
MIN_OUTPUT_TOKENS: Final = 16
LOGPROBS: Final = "message.output_text.logprobs"
"""The value of `include` that asks for log probabilities."""


_METADATA_KEYS: Final = 16
_METADATA_KEY_CHARS: Final = 64
_METADATA_VALUE_CHARS: Final = 512


def _metadata(value: object) -> object:
    """Refuses values that are not text, and long texts. Pydantic's error would quote the client's
    keys."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(one, str) for one in value.values()):
        raise PydanticCustomError("string_type", "Its values should be texts")
    keys_fit = all(len(one) <= _METADATA_KEY_CHARS for one in value)
    if not keys_fit or any(len(one) > _METADATA_VALUE_CHARS for one in value.values()):
        raise PydanticCustomError(
            "string_too_long",
            f"Keys should have at most {_METADATA_KEY_CHARS} characters, values at most "
            f"{_METADATA_VALUE_CHARS}",
        )
    return value


Metadata = Annotated[
    dict[str, str] | None,
    BeforeValidator(_metadata),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"maxLength": _METADATA_KEY_CHARS},
                    "additionalProperties": {"type": "string", "maxLength": _METADATA_VALUE_CHARS},
                    "maxProperties": _METADATA_KEYS,
                },
                {"type": "null"},
            ]
        }
    ),
]


class ResponseRequest(OpenAIModel):
    """A chat to answer; the server does not store it."""

    known_keys = frozenset(
        {
            "arguments",
            "call_id",
            "content",
            "description",
            "format",
            "name",
            "output",
            "parameters",
            "refusal",
            "role",
            "schema",
            "text",
            "tools",
            "type",
        }
    )
    unsupported: ClassVar = {
        **PENALTIES,
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_completion_tokens": (),
        "max_tokens": (),
        "moderation": (),
        "n": (1,),
        "previous_response_id": (),
        "prompt": (),
        "response_format": (),
        "seed": (),
        "stop": ([],),
        "truncation": ("disabled",),
    }

    model: str = Field(
        max_length=MAX_NAME,
        description="`phi3`, `hermes`, or `phi3:` and the adapter in use",
        examples=["hermes"],
    )
    input: InputItems = Field(
        min_length=1,
        description="the user's turn, or the chat with the calls and results of functions in it",
        examples=["AAPL: RSI 78, stop 2 %. What now?"],
    )
    instructions: str | None = Field(
        None,
        description="a system turn before `input`",
        examples=["You are a careful risk manager."],
    )
    text: TextConfig | None = Field(
        None,
        description="how the text of the answer looks",
        examples=[{"format": {"type": "text"}}],
    )
    tools: list[Tool] | None = Field(
        None,
        max_length=128,
        description="functions that the model may call",
        examples=[[{"type": "function", "name": "get_price"}]],
    )
    tool_choice: ChosenTool = Field(
        None,
        description="whether the model calls a function: `none`, `auto` (default), `required`, or "
        "the function that it has to call",
        examples=["auto"],
    )
    max_output_tokens: int | None = Field(
        None,
        ge=MIN_OUTPUT_TOKENS,
        le=MAX_OUTPUT_TOKENS,
        description="the maximum number of tokens of the answer",
        examples=[256],
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 is greedy; null for the model's own sampling",
        examples=[0.7],
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="nucleus sampling; null for the model's own",
        examples=[0.9],
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="how many of the most likely tokens come with each token, if `include` has "
        f"`{LOGPROBS}`",
        examples=[5],
    )
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "web_search_call.action.sources",
                "web_search_call.results",
            ]
        ]
        | None
    ) = Field(
        None,
        max_length=32,
        description=f"`{LOGPROBS}` for log probabilities; other values are ignored, because they "
        "do not apply to any answer",
        examples=[[LOGPROBS]],
    )
    stream: bool | None = Field(None, description="true for server-sent events", examples=[False])
    metadata: Metadata = Field(
        None,
        max_length=_METADATA_KEYS,
        description="texts that the response repeats",
        examples=[{"desk": "equities"}],
    )
    parallel_tool_calls: bool | None = Field(
        None, description="ignored: an answer has one call at most", examples=[False]
    )
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="ignored; the response repeats it", examples=["desk"]
    )
    safety_identifier: str | None = Field(
        None, max_length=64, description="ignored; the response repeats it", examples=["trader-7"]
    )
