"""JSON schemas of clients as guidance."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.services.client_schemas import guidance_of, relocated

COMPACT = {"x-guidance": {"whitespace_flexible": False}}


@pytest.mark.parametrize(
    ("schema", "guided"),
    [
        ({"type": "object"}, {"type": "object"}),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array"},
            {"type": "array"},
        ),
        ({"x-guidance": {"lenient": True}, "type": "null"}, {"type": "null"}),
        (
            {"properties": {"a": {"items": {"properties": {}}}}},
            {
                "properties": {
                    "a": {"items": {"properties": {}, "additionalProperties": False}},
                },
                "additionalProperties": False,
            },
        ),
        # What a schema says of other properties stays.
        (
            {"properties": {}, "additionalProperties": True},
            {"properties": {}, "additionalProperties": True},
        ),
        ({"properties": {}, "patternProperties": {}}, {"properties": {}, "patternProperties": {}}),
        # A property may have the name of a keyword.
        (
            {"properties": {"properties": {"type": "string"}, "const": {"properties": {}}}},
            {
                "properties": {
                    "properties": {"type": "string"},
                    "const": {"properties": {}, "additionalProperties": False},
                },
                "additionalProperties": False,
            },
        ),
        # Values are no schemas.
        ({"const": {"properties": {}}}, {"const": {"properties": {}}}),
        # An object whose properties come from several schemas stays open.
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        ),
        (
            {"$defs": {"A": {"properties": {}}}, "properties": {}, "$ref": "#/$defs/A"},
            {"$defs": {"A": {"properties": {}}}, "properties": {}, "$ref": "#/$defs/A"},
        ),
        # Only that object stays open.
        (
            {
                "anyOf": [
                    {"properties": {}, "anyOf": [{"properties": {"a": {"properties": {}}}}]},
                    {"properties": {"b": {"properties": {}}}},
                ]
            },
            {
                "anyOf": [
                    {"properties": {}, "anyOf": [{"properties": {"a": {"properties": {}}}}]},
                    {
                        "properties": {"b": {"properties": {}, "additionalProperties": False}},
                        "additionalProperties": False,
                    },
                ]
            },
        ),
        # What it refers to, also through another reference, stays open too.
        (
            {
                "$defs": {
                    "a/b": {"$ref": "#/$defs/list/prefixItems/0"},
                    "list": {"prefixItems": [{"properties": {}}]},
                    "c": {"properties": {}},
                },
                "items": {"properties": {}, "$ref": "#/$defs/a~1b"},
            },
            {
                "$defs": {
                    "a/b": {"$ref": "#/$defs/list/prefixItems/0"},
                    "list": {"prefixItems": [{"properties": {}}]},
                    "c": {"properties": {}, "additionalProperties": False},
                },
                "items": {"properties": {}, "$ref": "#/$defs/a~1b"},
            },
        ),
        # A reference to nothing, or to the schema itself.
        (
            {"items": {"properties": {}, "$ref": "#/$defs/none"}, "allOf": [{"$ref": "#"}]},
            {"items": {"properties": {}, "$ref": "#/$defs/none"}, "allOf": [{"$ref": "#"}]},
        ),
        # Closed, a negated schema would forbid less.
        ({"not": {"properties": {}}}, {"not": {"properties": {}}}),
        # A property may have the name of a keyword that combines.
        (
            {"properties": {"allOf": {}, "anyOf": {}}},
            {"properties": {"allOf": {}, "anyOf": {}}, "additionalProperties": False},
        ),
    ],
)
def test_objects_are_closed_and_white_space_is_forbidden(
    schema: dict[str, Any], guided: dict[str, Any]
) -> None:
    before = json.dumps(schema)
    assert json.loads(guidance_of(schema)) == guided | COMPACT
    assert json.dumps(schema) == before


def test_references_follow_a_schema_that_moves() -> None:
    schema = {
        "$defs": {"A": {"items": {"$ref": "#/$defs/A"}}},
        "properties": {"$ref": {"$ref": "#"}, "b": {"const": {"$ref": "#/x"}}},
        "anyOf": [{"$ref": "other.json"}, {"$ref": "#/$defs/A"}, True],
    }
    assert relocated(schema, "#/$defs/t") == {
        "$defs": {"A": {"items": {"$ref": "#/$defs/t/$defs/A"}}},
        "properties": {"$ref": {"$ref": "#/$defs/t"}, "b": {"const": {"$ref": "#/x"}}},
        "anyOf": [{"$ref": "other.json"}, {"$ref": "#/$defs/t/$defs/A"}, True],
    }
