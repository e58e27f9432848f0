"""The guidance of a generation as a regular expression, for servers that support one.

    schema_regex(proposals.GUIDANCE)

It matches exactly the compact JSON that llguidance allows for the same schema, except that it does
not bound the length of a string that has a pattern and a length. It uses only literals, classes,
groups, alternatives and repetitions, which all engines support.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from llm_sidecar.engines.bounded_schema import Pattern, read_object

_KEPT: Final = 8


@functools.lru_cache(_KEPT)
def schema_regex(schema: str) -> str:
    """A regular expression for the compact JSON of a schema, with the properties in their order.

    Args:
        schema: JSON schema text of an object of strings, numbers, enums and nulls.

    Raises:
        ValueError: the schema has an unsupported keyword or type.
    """
    parts = []
    for field in read_object(schema):
        part = f"{literal(field.key)}({'|'.join(map(_value, field.values))})"
        parts.append(part if field.required else f"({part})?")
    expression = rf"\{{{''.join(parts)}\}}"
    # Half of a surrogate pair cannot be sent, and raises a ValueError here.
    expression.encode()
    return expression


def _value(value: str | Pattern) -> str:
    if isinstance(value, str):
        return literal(value)
    return f"{value.quote}({value.expression}){value.quote}"


def literal(text: str) -> str:
    """An expression that matches this text."""
    return re.sub(r"([][(){}.*+?^$|\\])", r"\\\1", text)
