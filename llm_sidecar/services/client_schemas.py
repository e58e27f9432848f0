"""JSON schemas of clients as guidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

_COMBINING: Final = frozenset({"properties", "$ref", "anyOf", "oneOf"})
"""Keywords two of which beside each other combine several schemas of one object."""
_ALWAYS_COMBINING: Final = frozenset({"allOf", "if", "not"})
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
    objects whose schema mentions other properties, and those in a combination of several schemas.
    """
    guided = dict(_closed(schema, _combined(schema)))
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


def _closed(schema: Any, combined: set[int]) -> Any:
    """The schema, with objects that allow no further properties.

    Args:
        combined: the ids of the schemas that stay open.
    """
    if not isinstance(schema, Mapping):
        return schema
    closed = _changed(schema, lambda part: _closed(part, combined))
    is_open = id(schema) in combined or any(name in schema for name in _OPEN)
    if isinstance(schema.get("properties"), Mapping) and not is_open:
        closed["additionalProperties"] = False
    return closed


def _combined(root: Mapping[str, Any]) -> set[int]:
    """The ids of all schemas in a combination of several schemas of one object. They must stay open
    for each other's properties."""
    combined: set[int] = set()
    waiting = [part for part in _all_in(root) if _combines(part)]
    while waiting:
        part = waiting.pop()
        if id(part) not in combined:
            combined.add(id(part))
            target = _target(root, part.get("$ref"))
            waiting += [other for other in (*_parts(part), target) if isinstance(other, Mapping)]
    return combined


def _combines(schema: Mapping[str, Any]) -> bool:
    return not _ALWAYS_COMBINING.isdisjoint(schema) or len(_COMBINING & schema.keys()) > 1


def _all_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas in it."""
    if isinstance(schema, Mapping):
        yield schema
        for part in _parts(schema):
            yield from _all_in(part)


def _parts(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas directly in a schema, and other values."""
    parts: list[Any] = []
    _changed(schema, parts.append)
    return parts


def _target(root: Mapping[str, Any], reference: object) -> Any:
    """What a reference within a schema refers to; None if that does not exist."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    target: Any = root
    for name in unquote(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(name) if isinstance(target, list) else name]
        except (LookupError, TypeError, ValueError):
            return None
    return target


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
