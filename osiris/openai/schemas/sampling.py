"""Fields that chats and completions share."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from osiris.openai.schemas.base import MAX_NAME, OpenAIModel

MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 256
MAX_CHOICES: Final = 8
_SEEDS: Final = 1 << 32
"""Seeds that every engine accepts."""

PENALTIES: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": (),
}
"""Unsupported sampling fields, of OpenAI's API and of other servers, with their harmless values."""


def _stops(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise PydanticCustomError(
            "stop_type", "Input should be a text or a list of texts, none of them empty"
        )
    if len(value) > MAX_STOPS:
        raise PydanticCustomError("too_long", f"List should have at most {MAX_STOPS} texts")
    if any(len(one) > MAX_STOP_CHARS for one in value):
        raise PydanticCustomError(
            "string_too_long", f"Texts should have at most {MAX_STOP_CHARS} characters"
        )
    return value


_STOP: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stops = Annotated[
    list[str],
    BeforeValidator(lambda value: [] if value is None else _stops(value)),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP,
                {
                    "type": "array",
                    "items": _STOP,
                    "maxItems": MAX_STOPS,
                },
                {"type": "null"},
            ]
        }
    ),
]
"""Texts before which an answer ends."""


class StreamOptions(OpenAIModel):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None,
        description="whether the last event has the numbers of tokens, and no choices",
        examples=[True],
    )


class SampledRequest(OpenAIModel):
    """What chats and completions have in common."""

    model: str = Field(
        max_length=MAX_NAME,
        description="`phi3`, `hermes`, or `phi3:` and the name of the adapter in use",
        examples=["hermes"],
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None,
        description="0 is greedy; higher values are more random; null for the server's own setting",
        examples=[0.7],
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="only the most likely tokens that together have this probability; null for the "
        "model's own setting",
        examples=[0.9],
    )
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(
        None, description="makes sampling repeatable; choice i uses seed + i", examples=[7]
    )
    stop: Stops = Field(
        [],
        description=f"up to {MAX_STOPS} texts before which the answer ends, each with up to "
        f"{MAX_STOP_CHARS} characters",
        examples=["\n\n", ["User:", "END"]],
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="the number of answers, generated separately; 1 for null", examples=[1]
    )
    stream: bool | None = Field(
        None, description="whether the answer comes as server-sent events", examples=[False]
    )
    stream_options: StreamOptions | None = Field(
        None, description="options of a stream", examples=[{"include_usage": True}]
    )

    @property
    def choices(self) -> int:
        """The number of answers."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether the last event of a stream has the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def seed_of(self, number: int) -> int | None:
        """The seed of a choice."""
        return None if self.seed is None else (self.seed + number) % _SEEDS


class CachedTokens(BaseModel):
    """Details of the tokens of the prompt."""

    cached_tokens: int = Field(description="tokens whose states were cached", examples=[96], ge=0)


class Usage(BaseModel):
    """The numbers of tokens."""

    prompt_tokens: int = Field(
        description="tokens of the prompt, counted once for all choices", examples=[112], ge=0
    )
    completion_tokens: int = Field(
        description="tokens of all choices together", examples=[41], ge=0
    )
    total_tokens: int = Field(description="the sum of both", examples=[153], ge=0)
    prompt_tokens_details: CachedTokens = Field(
        description="details of the tokens of the prompt", examples=[{"cached_tokens": 96}]
    )
