"""The reader of bounded schemas; what it refuses is in `test_gbnf` and `remote/test_guiding`."""

from __future__ import annotations

import json
from typing import Any

from llm_sidecar.engines.bounded_schema import Pattern, Property, read_object


def properties(required: list[str], **properties: Any) -> list[Property]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return read_object(json.dumps({**schema, "required": required}))


def test_properties_have_their_order_and_say_whether_they_are_required() -> None:
    assert properties(
        ["a", 'c"'], a={"enum": [1]}, b={"type": "null"}, **{'c"': {"enum": ["é"]}}
    ) == [
        Property('"a":', True, ("1",)),
        Property(',"b":', False, ("null",)),
        Property(',"c\\"":', True, ('"é"',)),
    ]


def test_alternatives_are_one_list() -> None:
    number = {"type": "number", "minimum": 0, "maximum": 2, "multipleOf": 0.01}
    either = {"anyOf": [number, {"anyOf": [{"type": "null"}, {"enum": [True, {"b": [1]}]}]}]}
    (one,) = properties(["a"], a=either)
    decimals = Pattern(r"(0|1)(\.[0-9]{1,2})?|2(\.0{1,2})?")
    assert one.values == (decimals, "null", "true", '{"b":[1]}')


def test_a_string_has_its_pattern_and_its_length() -> None:
    (one, two) = properties(
        ["a", "b"],
        a={"type": "string", "pattern": "^[a-z]$"},
        b={"type": "string", "pattern": r"^b\$$", "minLength": 1, "maxLength": 9},
    )
    assert one.values == (Pattern("[a-z]", '"'),)
    assert two.values == (Pattern(r"b\$", '"', 1, 9),)
