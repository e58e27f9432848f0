"""JSON schemas of clients as guidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

_COMBINING: Final = ("$ref", "anyOf", "oneOf", "if", "not")
"""Keywords that combine an object's schema with another one; `allOf` always does."""
_OPEN: Final = ("additionalProperties", "unevaluatedProperties", "patternProperties")
"""Keywords that say which other properties an object may have."""
_VALUES: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are not schemas."""
_NAMED: Final = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
"""Keywords whose values map names to schemas."""


def guidance_of(schema: Mapping[str, Any]) -> str:
    """The guidance (llguidance dialect) of answers that follow a schema.

    Answers have no whitespace between values, because a model may write it without end. Objects
    have only the properties that the schema names, because models invent others. Exceptions are
    schemas that mention other properties, or that combine several schemas of one object.
    """
    guided = dict(schema if _combines(schema) else _closed(schema))
    guided["x-guidance"] = {"whitespace_flexible": False}
    # It names the dialect, which is always the same.
    guided.pop("$schema", None)
    return json.dumps(guided)


def relocated(schema: Any, pointer: str) -> Any:
    """A schema whose references to itself work once it is at `pointer` of another document.

    Args:
        schema: a JSON schema, or a value in one.
        pointer: JSON pointer in a URI fragment, such as `#/$defs/order`.
    """
    if not isinstance(schema, Mapping):
        return schema
    moved = _changed(schema, lambda part: relocated(part, pointer))
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = pointer + target[1:]
    return moved


def _closed(schema: Any) -> Any:
    """The schema, with objects that allow no further properties."""
    if not isinstance(schema, Mapping):
        return schema
    closed = _changed(schema, _closed)
    if isinstance(schema.get("properties"), Mapping) and not any(name in schema for name in _OPEN):
        closed["additionalProperties"] = False
    return closed


def _combines(schema: Any) -> bool:
    """Whether the properties of some object come from several schemas, which must stay open for
    each other's properties."""
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    if "allOf" in schema or ("properties" in schema and any(name in schema for name in _COMBINING)):
        return True
    return any(map(_combines, schema.values()))


def _changed(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A schema with each schema in it changed."""
    changed: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _VALUES:
            changed[name] = value
        elif name in _NAMED and isinstance(value, Mapping):
            changed[name] = {key: change(part) for key, part in value.items()}
        elif isinstance(value, list):
            changed[name] = [change(part) for part in value]
        else:
            changed[name] = change(value)
    return changed
