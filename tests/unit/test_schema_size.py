"""The bounds of a client's schema."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llm_sidecar.engines.schema_size import check_size
from llm_sidecar.errors import InvalidRequest


def patterns(count: int) -> dict[str, Any]:
    return {"patternProperties": {f"^k{number:02}": {} for number in range(count)}}


def multiples(*factors: float) -> dict[str, Any]:
    options = [{"type": "number", "multipleOf": factor} for factor in factors]
    return {"anyOf": options}


def values(count: int) -> dict[str, Any]:
    """A schema of `count` values: itself, the list, and its items."""
    return {"enum": [0] * (count - 2)}


ALLOWED = (
    values(4096),
    patterns(32),
    multiples(0.01, 0.05, 0.25, 1, 5),
    multiples(10_000),
    multiples(97, 97, 103),
    multiples(0.0001),
    {"properties": {"multipleOf": {"type": "integer"}, "patternProperties": {"type": "string"}}},
    {"properties": {"patternProperties": True}},
    {"multipleOf": "ten"},
    {"multipleOf": 0},
    {"multipleOf": True},
    {"multipleOf": 1e400},
    {"const": "a" * 60_000},
    True,
)
REFUSED = (
    (values(4097), "it has more than 4096 values; shorten it"),
    (patterns(33), "it has more than 32 patternProperties; use fewer"),
    ({"items": [patterns(33)]}, "it has more than 32 patternProperties; use fewer"),
    (multiples(10_001), "its multipleOf is too large, or has too many digits"),
    (multiples(1e30), "its multipleOf is too large, or has too many digits"),
    (multiples(1.2345678), "its multipleOf is too large, or has too many digits"),
    (multiples(101, 103), "its multipleOf is too large, or has too many digits"),
    ({"const": "a" * 65_530}, "it has more than 64 KiB; shorten it"),
    ({"const": "é" * 32_768}, "it has more than 64 KiB; shorten it"),
)


@pytest.mark.parametrize("schema", ALLOWED)
def test_a_schema_of_bounded_size_is_allowed(schema: Any) -> None:
    check_size(json.dumps(schema, ensure_ascii=False))


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_a_larger_schema_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^schema: {re.escape(reason)}$"):
        check_size(json.dumps(schema, ensure_ascii=False))


@pytest.mark.parametrize("text", ["", "{", '{"a":', "[" * 10_000, "\ud83d"])
def test_a_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^schema: it is not valid JSON$"):
        check_size(text)
