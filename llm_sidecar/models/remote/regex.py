"""The guidance of a generation as a regular expression, for servers that support one.

    schema_regex(proposals.GUIDANCE)

It matches exactly the compact JSON that llguidance allows for the same schema, except that it does
not bound the length of a string that has a pattern and a length. It uses only literals, classes,
groups, alternatives and repetitions, which all engines support.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from llm_sidecar.engines.regular import compile_pattern, without_anchors

_KEPT: Final = 8
_MOST_NUMBER: Final = 1000
_ESCAPED: Final = frozenset('"\\')


@functools.lru_cache(_KEPT)
def schema_regex(schema: str) -> str:
    """A regular expression for the compact JSON of a schema, with the properties in their order.

    Args:
        schema: JSON schema text of an object of strings, numbers, enums and nulls.

    Raises:
        ValueError: the schema has an unsupported keyword or type.
    """
    try:
        expression = _object(json.loads(schema))
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # A keyword is missing, or its value has another type.
        raise ValueError(f"the schema is not supported ({type(error).__name__})") from None
    # Half of a surrogate pair cannot be sent, and raises a ValueError here.
    expression.encode()
    return expression


def _object(schema: Any) -> str:
    _check_keys(schema, {"type", "properties", "required", "additionalProperties", "x-guidance"})
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        raise ValueError("only an object without other properties is supported")
    required, parts = set(schema.get("required", ())), []
    for number, (name, value) in enumerate(schema.get("properties", {}).items()):
        if number == 0 and name not in required:
            raise ValueError("the first property must be required")
        comma = "," if number else ""
        part = f"{literal(f'{comma}{json.dumps(name)}:')}{_value(value)}"
        parts.append(part if name in required else f"({part})?")
    return rf"\{{{''.join(parts)}\}}"


def _value(schema: Mapping[str, Any]) -> str:
    """A group that matches a value."""
    if "enum" in schema:
        _check_keys(schema, {"enum"})
        return f"({'|'.join(literal(_dumps(value)) for value in schema['enum'])})"
    if "anyOf" in schema:
        _check_keys(schema, {"anyOf"})
        return f"({'|'.join(map(_value, schema['anyOf']))})"
    match schema.get("type"):
        case "null":
            _check_keys(schema, {"type"})
            return "(null)"
        case "number":
            return _number(schema)
        case "string":
            _check_keys(schema, {"type", "pattern", "minLength", "maxLength"})
            return _string(schema.get("pattern", ""))
    raise ValueError("a value has no supported type")


def _number(schema: Mapping[str, Any]) -> str:
    """Numbers from 0 to an integer, with at most as many decimals as `multipleOf` has."""
    _check_keys(schema, {"type", "minimum", "maximum", "multipleOf"})
    most, step = schema.get("maximum", 0), str(schema.get("multipleOf"))
    decimals = re.fullmatch(r"0\.(0*)1", step)
    if schema.get("minimum") != 0 or decimals is None or not 0 < most <= _MOST_NUMBER or most % 1:
        raise ValueError("only numbers from 0 to an integer, with some decimals, are supported")
    places = len(decimals[1]) + 1
    below = "|".join(map(str, range(int(most))))
    return rf"(({below})(\.[0-9]{{1,{places}}})?|{int(most)}(\.0{{1,{places}}})?)"


def _string(pattern: str) -> str:
    if not pattern:
        raise ValueError("a string needs a pattern, which bounds it")
    automaton = compile_pattern(pattern)
    for char in itertools.chain.from_iterable(automaton.moves):
        if char in _ESCAPED or not char.isprintable():
            raise ValueError("a pattern holds a character that JSON escapes")
    return f'"({without_anchors(pattern)})"'


def literal(text: str) -> str:
    """An expression that matches this text."""
    return re.sub(r"([][(){}.*+?^$|\\])", r"\\\1", text)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_keys(schema: Mapping[str, Any], known: set[str]) -> None:
    if unknown := schema.keys() - known:
        raise ValueError(f"the schema holds {', '.join(sorted(unknown))}")
