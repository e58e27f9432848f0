"""Validation of an object whose `type` decides its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel
from pydantic_core import PydanticCustomError


def by_type(
    kinds: Mapping[str, type[BaseModel]], wanted: str, default: str | None = None
) -> Callable[[object], object]:
    """A validator of an object whose `type` decides its model.

    It replaces a union, which would name its members in the locations of errors.

    Args:
        kinds: the model of each type.
        wanted: the message of the error for another type.
        default: the type of an object without one.
    """

    def validate(value: object) -> object:
        kind = value.get("type", default) if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise PydanticCustomError("unsupported_value", wanted)
        return kinds[kind].model_validate(value)

    return validate
