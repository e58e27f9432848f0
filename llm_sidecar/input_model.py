"""Pydantic models of input from outside: over HTTP, from Redis or from a script.

class Request(InputModel):
    prompt: str
    details: dict[str, Any] = {}

request = Request.model_validate(received)
check_length(request, settings.max_prompt_chars)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from llm_sidecar.text import CALLERS_KEY, Fault, Location, find_fault, find_length_fault


def _text(value: object) -> object:
    if fault := find_fault(value):
        raise PydanticCustomError(fault.kind, fault.message)
    return value


IS_TEXT: Final = BeforeValidator(_text)
DOCUMENTED_AS_TEXT: Final = Field(
    json_schema_extra={"pattern": r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"}
)
"""Describes the check of `IS_TEXT` in the OpenAPI document."""
Text = Annotated[str, IS_TEXT, DOCUMENTED_AS_TEXT]
"""A checked string outside of an `InputModel`: a path or query parameter."""


def _digits(value: object) -> object:
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        raise PydanticCustomError("int_parsing", "Input should be an integer in decimal digits")
    return value


_INTEGER: Final = re.compile(r"-?[0-9]+")
QueryInteger = Annotated[int, BeforeValidator(_digits)]
"""An integer in a query. Pydantic would also accept `5.0`, `+5` and `1_000`."""


def _text_or_object(value: object) -> object:
    if not isinstance(value, str | Mapping):
        # One error; a union would give one for each of its types.
        raise PydanticCustomError("text_or_object", "Input should be a string or an object")
    return value


TextOrObject = Annotated[str | dict[str, Any], BeforeValidator(_text_or_object)]


class InputModel(BaseModel):
    """Every string in a field, at any depth and keys included, is text; see `llm_sidecar.text`.

    An error quotes nothing of the input.

    Attributes:
        not_text: fields that are not text, such as audio in base64.
        known_keys: keys of objects that a schema defines, so that an error may name them.
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
            return handler(cls._with_one_unknown(value))
        except ValidationError as error:
            faults = [cls._without_input(entry) for entry in error.errors(include_input=False)]
        # After the block: inside it, the error that quotes the input would become the context.
        raise _as_error(cls.__name__, faults)

    @classmethod
    def _with_one_unknown(cls, value: object) -> object:
        """Keeps one unknown field: errors for a hundred thousand of them take a second, and only
        one is reported."""
        if not isinstance(value, Mapping):
            return value
        unknown = [name for name in value if name not in cls.model_fields]
        if len(unknown) < 2:
            return value
        return {name: value[name] for name in (*cls.model_fields, unknown[0]) if name in value}

    @classmethod
    def _without_input(cls, entry: Mapping[str, Any]) -> Fault:
        kind, message, location = entry["type"], entry["msg"], entry["loc"]
        if kind == "extra_forbidden":
            location = (*location[:-1], CALLERS_KEY)
            if len(location) == 1:
                message = f"Unknown field; the known ones are {', '.join(cls.model_fields)}"
        return Fault(kind, message, location)


def check_length(given: InputModel, max_chars: int) -> None:
    """Checks that no text in a model, and no object in it as JSON, exceeds MAX_PROMPT_CHARS.

    Args:
        given: a model.
        max_chars: the setting's value.

    Raises:
        ValidationError: names every field that is too long.
    """
    faults = [
        fault._replace(location=(name,))
        for name, value in given
        if name not in given.not_text and (fault := find_length_fault(value, max_chars))
    ]
    if faults:
        raise _as_error(type(given).__name__, faults)


def longest_payload(max_chars: int) -> int:
    """The maximum length in characters of a JSON message with one text and one object of
    `max_chars` characters each.

    JSON takes up to twelve characters for one of text. A longer message is refused unread.
    """
    return 2 * 12 * max_chars + (1 << 14)


def summary(error: ValidationError) -> str:
    """What is wrong with which field, on one line, from an error of an `InputModel`."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in faults
    )


def _as_error(title: str, faults: Iterable[Fault]) -> ValidationError:
    """Keeps only the first error of each location, so that no field is reported twice."""
    by_location: dict[Location, Fault] = {}
    for fault in faults:
        by_location.setdefault(fault.location, fault)
    details = [
        InitErrorDetails(
            type=PydanticCustomError(fault.kind, fault.message),
            loc=location,
            # `ValidationError.errors` would show it.
            input=None,
        )
        for location, fault in by_location.items()
    ]
    return ValidationError.from_exception_data(title, details, hide_input=True)
