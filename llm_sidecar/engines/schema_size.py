"""Bounds of a JSON schema, so that llguidance compiles it in half a second.

llguidance 1.9 has limits of its own, but some schemas take it seconds, or all memory, before it
reaches one. The costs are the number of options times the number of properties, pairs of
patternProperties, and the remainders of multipleOf, which are states of an automaton.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

from llm_sidecar.errors import InvalidRequest

_BYTES: Final = 1 << 16
_VALUES: Final = 4096
_PATTERNS: Final = 32
_REMAINDERS: Final = 10_000


def check_size(schema: str) -> None:
    """Raises InvalidRequest if a schema is not JSON, or too large."""
    try:
        size = len(schema.encode())
        values = [] if size > _BYTES else list(_values(json.loads(schema)))
    except (ValueError, RecursionError):
        raise InvalidRequest("it is not valid JSON", field="schema") from None
    if size > _BYTES:
        raise InvalidRequest(f"it has more than {_BYTES >> 10} KiB; shorten it", field="schema")
    if len(values) > _VALUES:
        raise InvalidRequest(f"it has more than {_VALUES} values; shorten it", field="schema")
    objects = [value for value in values if isinstance(value, dict)]
    patterns = [one.get("patternProperties") for one in objects]
    if any(isinstance(one, dict) and len(one) > _PATTERNS for one in patterns):
        raise InvalidRequest(
            f"it has more than {_PATTERNS} patternProperties; use fewer", field="schema"
        )
    factors = [one["multipleOf"] for one in objects if "multipleOf" in one]
    if math.lcm(*(_coefficient(factor) for factor in factors)) > _REMAINDERS:
        raise InvalidRequest("its multipleOf is too large, or has too many digits", field="schema")


def _values(value: Any) -> Iterator[Any]:
    """A JSON value and all values in it."""
    pending = [value]
    while pending:
        value = pending.pop()
        yield value
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _coefficient(factor: Any) -> int:
    """The digits of a number without its decimal point: 25 for 0.25; 1 for anything else."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        return 1
    _, digits, exponent = Decimal(repr(factor)).normalize().as_tuple()
    assert isinstance(exponent, int)
    return int("".join(map(str, digits)) + "0" * exponent)
