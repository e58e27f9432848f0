"""Models of what comes from outside, over HTTP, from Redis or from a script.

class Question(InputModel):
    prompt: str
    details: dict[str, Any] = {}

question = Question.model_validate(received)
check_length(question, settings.max_prompt_chars)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from llm_sidecar.text import CALLERS_KEY, Fault, find_fault, find_length_fault


def _text(value: object) -> object:
    if fault := find_fault(value):
        raise PydanticCustomError(fault.kind, fault.message)
    return value


Text = Annotated[str, BeforeValidator(_text)]
"""A string that is text, where no `InputModel` checks it: a parameter in a path or a query."""


def _text_or_object(value: object) -> object:
    if not isinstance(value, str | Mapping):
        # One error, where a union would give one for each of its types.
        raise PydanticCustomError("text_or_object", "Input should be a string or an object")
    return value


TextOrObject = Annotated[str | dict[str, Any], BeforeValidator(_text_or_object)]


class InputModel(BaseModel):
    """Every string in a field is text, as `llm_sidecar.text` has it, at any depth, keys included.

    An error quotes nothing of what was validated.

    Attributes:
        not_text: fields that nobody reads as text, such as sound in base64.
        known_keys: keys in objects that a schema defines, so that a location may show them.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    not_text: ClassVar[frozenset[str]] = frozenset()
    known_keys: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name not in cls.not_text and (fault := find_fault(value, cls.known_keys)):
            raise _as_error(cls.__name__, [fault])
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _quote_nothing(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            faults = [cls._without_input(entry) for entry in error.errors(include_input=False)]
        # After the block, so that the error with the input is not this one's context.
        raise _as_error(cls.__name__, faults)

    @classmethod
    def _without_input(cls, entry: Mapping[str, Any]) -> Fault:
        kind, message, location = entry["type"], entry["msg"], entry["loc"]
        if kind == "extra_forbidden":
            location = (*location[:-1], CALLERS_KEY)
            if len(location) == 1:
                message = f"Unknown field; the known ones are {', '.join(cls.model_fields)}"
        return Fault(kind, message, location)


def check_length(given: InputModel, max_chars: int) -> None:
    """Checks that no text of a model, and no object of it as JSON, is longer than MAX_PROMPT_CHARS.

    Args:
        given: a model.
        max_chars: the setting's value.

    Raises:
        ValidationError: names every field that is.
    """
    faults = [
        fault._replace(location=(name,))
        for name, value in given
        if name not in given.not_text and (fault := find_length_fault(value, max_chars))
    ]
    if faults:
        raise _as_error(type(given).__name__, faults)


def longest_payload(max_chars: int) -> int:
    """Characters of a message of JSON that holds no more than a text and an object of the longest:
    JSON takes up to twelve for one of text. A longer message need not be read to be refused."""
    return 2 * 12 * max_chars + (1 << 14)


def summary(error: ValidationError) -> str:
    """One line that says what is wrong with which field, for an error of an `InputModel`."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in faults
    )


def _as_error(title: str, faults: Iterable[Fault]) -> ValidationError:
    details = [
        InitErrorDetails(
            type=PydanticCustomError(fault.kind, fault.message),
            loc=fault.location,
            # `ValidationError.errors` shows it.
            input=None,
        )
        for fault in faults
    ]
    return ValidationError.from_exception_data(title, details, hide_input=True)
