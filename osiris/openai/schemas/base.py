"""The base of all request bodies under `/v1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from llm_sidecar.input_model import InputModel

MAX_NAME: Final = 128
"""Characters of the name of a model or of a voice."""
MAX_TURNS: Final = 1024
"""Turns, calls and results of one chat. Each is validated on the event loop."""
MAX_PARTS: Final = 256
"""Parts of the content of a turn."""


class OpenAIModel(InputModel):
    """A request body, or a part of one: an object whose unknown fields are ignored.

    Attributes:
        unsupported: fields that would change the meaning of the request, each with its harmless
            values. null is always harmless.
    """

    # Do not convert types: text is not a number, and 12.0 is not an integer.
    model_config = ConfigDict(extra="ignore", strict=True)

    known_keys = frozenset(
        {"arguments", "content", "description", "function", "id", "json_schema", "name"}
        | {"parameters", "refusal", "role", "schema", "text", "tool_call_id", "tool_calls", "type"}
    )
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unsupported(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, Mapping):
            for name, harmless in cls.unsupported.items():
                if value.get(name) is not None and value[name] not in harmless:
                    raise _unsupported(cls.__name__, name)
        return handler(value)


def _unsupported(title: str, name: str) -> ValidationError:
    fault = PydanticCustomError(
        "unsupported_parameter", "This field is not supported; leave it out"
    )
    details = [InitErrorDetails(type=fault, loc=(name,), input=None)]
    return ValidationError.from_exception_data(title, details, hide_input=True)
