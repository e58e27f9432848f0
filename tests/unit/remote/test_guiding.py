"""Schemas as regular expressions, as fields of requests, and in the prompt."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from llm_sidecar import proposals
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.models.remote.guiding import (
    PROBE_TEXT,
    SCHEMA_FORMATS,
    forced,
    forced_number,
    guided,
    in_prompt,
    without,
)
from llm_sidecar.models.remote.regex import schema_regex

PROPOSAL: dict[str, Any] = {
    "ticker": "BRK.B",
    "action": "adjust",
    "side": "SHORT",
    "new_stop_pct": 99.99,
    "new_target_pct": 100,
    "confidence": 1,
    "rationale": "ATR (3.4%) at 182.40 calls for a stop.",
}
ENDLESS = '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}'


def matches(text: str, schema: str = proposals.GUIDANCE) -> bool:
    return re.fullmatch(schema_regex(schema), text) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"new_stop_pct": None, "new_target_pct": 0, "confidence": 0.07},
        {"new_stop_pct": 0.5, "confidence": 0.0},
        {"rationale": "It holds for now."},
    ],
)
def test_a_guided_proposal_matches(changes: dict[str, Any]) -> None:
    assert matches(proposals.dumps(PROPOSAL | changes))


def test_an_optional_property_may_be_left_out() -> None:
    assert matches(proposals.dumps({k: v for k, v in PROPOSAL.items() if k != "side"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"ticker": "brk"},
        {"ticker": "A" * 13},
        {"action": "buy"},
        {"new_stop_pct": 100.01},
        {"new_stop_pct": 1.234},
        {"new_target_pct": -1},
        {"confidence": 1.01},
        {"rationale": "Too short"},
        {"rationale": "A" * 200 + "."},
        {"rationale": 'A "quoted" word in it.'},
    ],
)
def test_another_value_does_not_match(changes: dict[str, Any]) -> None:
    assert not matches(proposals.dumps(PROPOSAL | changes))


def test_neither_whitespace_nor_another_order_matches() -> None:
    assert not matches(json.dumps(PROPOSAL))
    assert not matches(proposals.dumps(dict(reversed(PROPOSAL.items()))))
    assert not matches(proposals.dumps(PROPOSAL) + " ")


def test_the_guidance_of_a_context_has_its_tickers_and_numbers() -> None:
    grounded = proposals.grounded_guidance("Long BRK.B, now 182.40. ATR 3.4%")
    assert grounded is not None
    assert matches(proposals.dumps(PROPOSAL), grounded)
    assert not matches(proposals.dumps(PROPOSAL | {"ticker": "ABC"}), grounded)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array"},
        {"type": "object", "properties": {}},
        {"type": "object", "additionalProperties": False, "minProperties": 1},
        json.loads(ENDLESS) | {"additionalProperties": False},
        {
            "type": "object",
            "properties": {"a": {"type": "string", "pattern": '"'}},
            "required": ["a"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"a": {"type": "number"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "required": [],
            "additionalProperties": False,
        },
    ],
)
def test_what_cannot_be_expressed_is_an_error(schema: Any) -> None:
    with pytest.raises(ValueError):
        schema_regex(json.dumps(schema))


def closed(properties: Any, **changes: Any) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        | changes
    )


NUMBER = {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 0.1}


@pytest.mark.parametrize("translate", [schema_regex, to_gbnf])
@pytest.mark.parametrize(
    "schema",
    [
        closed({"price": {"type": "number"}}),
        closed({"a": {"enum": [1]}}, required=None),
        closed({"a": {"enum": [1]}}, required=[{}]),
        closed({"a": True}),
        closed({"a": None}),
        closed({"a": {"enum": 5}}),
        closed({"a": {"anyOf": [True]}}),
        closed({"a": {"anyOf": 5}}),
        closed({"a": {"type": ["string", "null"]}}),
        closed({"a": {"type": "string", "pattern": 5}}),
        closed({"a": {"type": "string", "pattern": "^a{x}$"}}),
        closed({"a": {"type": "string", "pattern": "a"}}),
        closed({"a": {"type": "string", "pattern": r"^a\$"}}),
        closed({"a": {"type": "string", "pattern": "^^a$"}}),
        closed({"a": {"type": "string", "pattern": "^a$", "minLength": "1"}}),
        closed({"a": {"type": "string", "pattern": "^a$", "maxLength": 1.5}}),
        closed({"a": {"enum": []}}),
        closed({"a": {"anyOf": []}}),
        closed({"a": NUMBER | {"maximum": "9"}}),
        closed({"a": NUMBER | {"maximum": None}}),
        closed({"a": NUMBER | {"maximum": float("inf")}}),
        closed({"a": NUMBER | {"maximum": float("nan")}}),
        closed(["a"]),
        closed([]).replace("[]", "5"),
        '{"additionalProperties": false, "required": ["a"]}',
        "true",
        "null",
        "[]",
        "5",
        "[" * 100_000,
        "",
    ],
)
def test_a_schema_that_cannot_be_translated_is_a_value_error(
    translate: Callable[[str], str], schema: str
) -> None:
    with pytest.raises(ValueError):
        translate(schema)


def test_a_missing_or_empty_list_of_properties_needs_no_exception() -> None:
    for translate in (schema_regex, to_gbnf):
        assert translate('{"type": "object", "additionalProperties": false}')


VALUES: tuple[Any, ...] = (
    True,
    None,
    0,
    -1,
    0.5,
    "",
    "^a$",
    "(",
    "number",
    [],
    [1],
    {},
    {"a": 1},
    ["a", "b"],
)
KEYWORDS = ("type", "properties", "required", "enum", "anyOf", "pattern", "minLength", "maxLength")


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with random parts replaced, added and left out."""
    if chance.random() < 0.1:
        return chance.choice(VALUES)
    if isinstance(value, list):
        return [changed(one, chance) for one in value if chance.random() < 0.95]
    if isinstance(value, dict):
        kept = {k: changed(one, chance) for k, one in value.items() if chance.random() < 0.95}
        return kept | ({chance.choice(KEYWORDS): True} if chance.random() < 0.02 else {})
    return value


@pytest.mark.parametrize("translate", [schema_regex, to_gbnf])
def test_any_json_is_translated_or_a_value_error(translate: Callable[[str], str]) -> None:
    schema = {
        "a": {"type": "string", "pattern": "^[a-c]{1,3}$", "minLength": 1, "maxLength": 2},
        "b": {"anyOf": [NUMBER, {"type": "null"}]},
        "c": {"enum": ["x", 1, None]},
    }
    chance, translated, refused = random.Random(0), 0, 0
    for _ in range(2000):
        try:
            text = translate(json.dumps(changed(json.loads(closed(schema)), chance)))
        except ValueError:
            refused += 1
        else:
            translated += bool(text)
    assert translated > 20
    assert refused > 1000


def test_half_a_surrogate_pair_cannot_be_sent() -> None:
    with pytest.raises(ValueError):
        schema_regex(closed({"a": {"enum": ["\ud800"]}}))


@pytest.mark.parametrize(("pattern", "text"), [(r"^a\$$", "a$"), ("^a$", "a"), ("^a|b$", "b")])
def test_only_an_anchor_at_the_end_of_a_pattern_is_left_out(pattern: str, text: str) -> None:
    schema = closed({"a": {"type": "string", "pattern": pattern}})
    assert matches(json.dumps({"a": text}, separators=(",", ":")), schema)


def test_the_length_beside_a_pattern_is_not_in_the_expression() -> None:
    schema = closed({"a": {"type": "string", "pattern": "^[ab]+$", "maxLength": 2}})
    assert schema_regex(schema) == r'\{"a":("([ab]+)")\}'


def test_the_probe_of_each_way_asks_for_the_same_text() -> None:
    regex, grammar, json_schema = SCHEMA_FORMATS
    assert re.fullmatch(regex.probe["regex"], PROBE_TEXT)
    assert grammar.probe == {"grammar": f"root ::= {json.dumps(PROBE_TEXT)}"}
    schema = json_schema.probe["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"osiris": {"enum": ["yes"]}}


def test_the_strongest_way_that_can_express_a_schema_is_taken() -> None:
    assert (guided(["regex", "json_schema"], proposals.GUIDANCE) or {}).keys() == {
        "regex",
        "structured_outputs",
    }
    assert (guided(["regex", "json_schema"], ENDLESS) or {}).keys() == {"response_format"}
    assert guided(["regex"], ENDLESS) is None
    assert guided(["regex", "grammar"], closed({"price": {"type": "number"}})) is None
    assert guided([], proposals.GUIDANCE) is None


def test_an_answer_can_be_made_to_begin_with_a_text() -> None:
    fields = forced(["regex"], '{"score": 1')
    assert fields is not None
    assert re.fullmatch(fields["regex"], '{"score": 10')
    assert not re.fullmatch(fields["regex"], '{"score": 2')
    assert forced(["grammar"], '"1') == {"grammar": r'root ::= "\"1" [^\x00]*'}
    assert forced(["json_schema"], "1") is None


def test_an_answer_can_be_made_a_longer_number_by_a_schema() -> None:
    fields = forced_number(["json_schema"], "1") or {}
    assert fields["response_format"]["json_schema"]["schema"] == {"const": 10}
    assert forced_number(["json_schema"], " 1") is None
    assert forced_number(["regex"], "1") is None


def test_keywords_are_left_out_and_properties_of_these_names_stay() -> None:
    schema = {"pattern": "a", "anyOf": [{"pattern": "b"}], "properties": {"pattern": {"x": 1}}}
    assert without(schema, "pattern") == {"anyOf": [{}], "properties": {"pattern": {"x": 1}}}


@pytest.mark.parametrize("keyword", ["$defs", "definitions", "patternProperties"])
def test_named_schemas_and_values_called_like_a_keyword_stay(keyword: str) -> None:
    schema = {keyword: {"pattern": {"type": "string", "pattern": "a"}}, "const": {"pattern": "b"}}
    expected = {keyword: {"pattern": {"type": "string"}}, "const": {"pattern": "b"}}
    assert without(schema, "pattern") == expected


def test_without_a_system_message_the_schema_gets_one() -> None:
    user = {"role": "user", "content": "Hold?"}
    first, second = in_prompt([user], proposals.GUIDANCE)
    assert first["role"] == "system"
    assert first["content"].startswith("Answer with one JSON object and nothing else. Its JSON")
    assert second == user
