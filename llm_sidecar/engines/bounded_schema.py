"""Reads the schema of an answer of bounded length: an object of strings, numbers, enums and nulls.

    for field in read_object(proposals.GUIDANCE):
        field.key  # ',"side":'
        field.values  # ('"LONG"', '"SHORT"')

`gbnf` and `models.remote.regex` write it as a grammar and as a regular expression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llm_sidecar.engines.regular import Work, characters, without_anchors

_MOST_NUMBER: Final = 1000
_ESCAPED: Final = frozenset('"\\')
"""Characters that a JSON string cannot hold as they are; control characters are the others."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """The texts of a string or a number.

    Attributes:
        expression: matches them as a whole; it has no anchors.
        quote: what JSON has before and after them: `"` for a string, nothing for a number.
        least, most: their length in characters; None for no maximum.
    """

    expression: str
    quote: str = ""
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Property:
    """A property of the object.

    Attributes:
        key: the compact JSON before its value: the comma, if it is not the first one, and its name.
        required: whether every object has it.
        values: the alternatives for its value, each a JSON text or a pattern.
    """

    key: str
    required: bool
    values: tuple[str | Pattern, ...]


def read_object(schema: str) -> list[Property]:
    """The properties of a schema, in the order in which the compact JSON has them.

    Args:
        schema: JSON schema text.

    Raises:
        ValueError: the schema has another form, or an unsupported keyword or type.
    """
    try:
        return _properties(json.loads(schema))
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # A keyword is missing, or its value has another type.
        raise ValueError(f"the schema is not supported ({type(error).__name__})") from None


def _properties(schema: Any) -> list[Property]:
    _check_keys(schema, {"type", "properties", "required", "additionalProperties", "x-guidance"})
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        raise ValueError("only an object without other properties is supported")
    required, work = set(schema.get("required", ())), Work()
    properties: list[Property] = []
    for name, value in schema.get("properties", {}).items():
        if not properties and name not in required:
            raise ValueError("the first property must be required")
        comma = "," if properties else ""
        values = _values(value, work)
        if not values:
            raise ValueError("a value has no alternatives")
        properties.append(Property(f"{comma}{json.dumps(name)}:", name in required, values))
    return properties


def _values(schema: Mapping[str, Any], work: Work) -> tuple[str | Pattern, ...]:
    if "enum" in schema:
        _check_keys(schema, {"enum"})
        return tuple(_dumps(value) for value in schema["enum"])
    if "anyOf" in schema:
        _check_keys(schema, {"anyOf"})
        return tuple(value for option in schema["anyOf"] for value in _values(option, work))
    match schema.get("type"):
        case "null":
            _check_keys(schema, {"type"})
            return ("null",)
        case "number":
            return (_number(schema),)
        case "string":
            return (_string(schema, work),)
    raise ValueError("a value has no supported type")


def _number(schema: Mapping[str, Any]) -> Pattern:
    """Numbers from 0 to an integer, with at most as many decimals as `multipleOf` has."""
    _check_keys(schema, {"type", "minimum", "maximum", "multipleOf"})
    most, step = schema["maximum"], str(schema["multipleOf"])
    decimals = re.fullmatch(r"0\.(0*)1", step)
    if schema["minimum"] != 0 or decimals is None or not 0 < most <= _MOST_NUMBER or most % 1:
        raise ValueError("only numbers from 0 to an integer, with some decimals, are supported")
    places = len(decimals[1]) + 1
    below = "|".join(map(str, range(int(most))))
    return Pattern(rf"({below})(\.[0-9]{{1,{places}}})?|{int(most)}(\.0{{1,{places}}})?")


def _string(schema: Mapping[str, Any], work: Work) -> Pattern:
    _check_keys(schema, {"type", "pattern", "minLength", "maxLength"})
    pattern, least, most = (schema.get(key) for key in ("pattern", "minLength", "maxLength"))
    expression = without_anchors(pattern or "")
    if pattern is None or len(expression) != len(pattern) - len("^$"):
        raise ValueError("a string needs a pattern from ^ to $, which bounds it")
    if not all(isinstance(length, int | None) for length in (least, most)):
        raise ValueError("the length of a string must be an integer")
    for char in characters(pattern, work):
        if char in _ESCAPED or not char.isprintable():
            raise ValueError("a pattern holds a character that JSON escapes")
    return Pattern(expression, '"', least or 0, most)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_keys(schema: Mapping[str, Any], known: set[str]) -> None:
    if unknown := schema.keys() - known:
        raise ValueError(f"the schema holds {', '.join(sorted(unknown))}")
