"""The content of a turn: a text, or parts of text.

Content = Annotated[
    str, BeforeValidator(joined({"text": "text"})), WithJsonSchema(schema({"text": "text"}))
]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from osiris.openai.schemas.base import MAX_PARTS


def joined(fields: Mapping[str, str]) -> Callable[[object], object]:
    """A validator that returns the text of a content: itself, or its parts joined by newlines.

    Args:
        fields: the types of parts, each with the field that has its text.
    """

    def validate(value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise PydanticCustomError(
                "content_type", "Input should be a text or a list of text parts"
            )
        if len(value) > MAX_PARTS:
            raise PydanticCustomError("too_long", f"List should have at most {MAX_PARTS} parts")
        return "\n".join(_text(number, part, fields) for number, part in enumerate(value))

    return validate


def schema(fields: Mapping[str, str]) -> dict[str, Any]:
    """The JSON schema of such a content."""
    texts: dict[str, Any] = {name: {"type": "string"} for name in dict.fromkeys(fields.values())}
    part = {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": list(fields)}, **texts},
        "required": ["type"],
    }
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "maxItems": MAX_PARTS}]}


def _text(number: int, part: object, fields: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in fields:
        message = f"Only parts of type {' and '.join(fields)} are supported"
        raise _fault((number, "type"), "unsupported_value", message)
    text = part.get(fields[kind])
    if not isinstance(text, str):
        raise _fault((number, fields[kind]), "string_type", "Input should be a valid string")
    return text


def _fault(location: tuple[str | int, ...], kind: Any, message: Any) -> ValidationError:
    details = InitErrorDetails(type=PydanticCustomError(kind, message), loc=location, input=None)
    return ValidationError.from_exception_data("content", [details], hide_input=True)
