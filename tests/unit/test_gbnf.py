"""Grammars of llama.cpp, read by a small parser of the same language."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from llm_sidecar import proposals
from llm_sidecar.engines import regular
from llm_sidecar.engines.gbnf import to_gbnf
from tests.gbnf_reader import Grammar

CONTEXT = "Long AAPL from 182.40, now 191.10, RSI 78. ATR 3.4%, MSFT at 400.25"


def object_of(**properties: Any) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def grammar_of(**properties: Any) -> Grammar:
    return Grammar(to_gbnf(object_of(**properties)))


@pytest.mark.parametrize("guidance", [proposals.GUIDANCE, proposals.grounded_guidance(CONTEXT)])
def test_every_text_is_a_valid_proposal_within_the_bound(guidance: str) -> None:
    grammar, chance = Grammar(to_gbnf(guidance)), random.Random(0)
    for _ in range(50):
        text = grammar.sample(chance)
        assert proposals.is_valid(json.loads(text)), text
        assert len(text) < proposals.MAX_COMPLETION_TOKENS


def test_the_longest_proposal_can_be_written() -> None:
    proposal = {
        "ticker": "ABCDEFGHIJKL",
        "action": "adjust",
        "side": "SHORT",
        "new_stop_pct": 99.99,
        "new_target_pct": 100,
        "confidence": 0.99,
        "rationale": "X" * 108 + ".",
    }
    assert Grammar(to_gbnf(proposals.GUIDANCE)).matches(proposals.dumps(proposal))
    proposal["rationale"] = "X" * 109 + "."
    assert not Grammar(to_gbnf(proposals.GUIDANCE)).matches(proposals.dumps(proposal))


def test_an_optional_property_may_be_left_out() -> None:
    schema = json.loads(object_of(a={"enum": [1]}, b={"enum": [2]}, c={"enum": [3]}))
    schema["required"] = ["a", "c"]
    grammar = Grammar(to_gbnf(json.dumps(schema)))
    assert grammar.matches('{"a":1,"b":2,"c":3}')
    assert grammar.matches('{"a":1,"c":3}')
    assert not grammar.matches('{"a":1,"b":2}')
    assert not grammar.matches('{"a":1, "c":3}')


@pytest.mark.parametrize("text", ["0", "0.5", "9.99", "10", "10.0", "10.00", "3.40"])
def test_a_number_within_its_bounds_is_allowed(text: str) -> None:
    number = {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.01}
    assert grammar_of(a=number).matches(f'{{"a":{text}}}')


@pytest.mark.parametrize("text", ["10.01", "11", "-1", "00", "01", "1.", ".5", "1.123", "1e1", ""])
def test_a_number_outside_of_its_bounds_is_not(text: str) -> None:
    number = {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.01}
    assert not grammar_of(a=number).matches(f'{{"a":{text}}}')


def test_a_number_or_null() -> None:
    number = {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.1}
    grammar = grammar_of(a={"anyOf": [number, {"type": "null"}]})
    assert grammar.matches('{"a":null}')
    assert grammar.matches('{"a":0.5}')
    assert not grammar.matches('{"a":nul}')


def test_an_enum_keeps_the_characters_that_mean_something_in_a_grammar() -> None:
    values = ['a"b', "]-^", "\\", "é", "|(", "x y"]
    grammar = grammar_of(a={"enum": values})
    for value in values:
        assert grammar.matches(json.dumps({"a": value}, ensure_ascii=False, separators=(",", ":")))


def test_a_grammar_is_the_same_text_each_time() -> None:
    assert to_gbnf(proposals.GUIDANCE) == to_gbnf(str(proposals.GUIDANCE))
    assert to_gbnf(object_of(a={"enum": [1]})) == (
        'root ::= "{" "\\U00000022a\\U00000022:" v0 "}"\nv0 ::= "1"\n'
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array"}, "a value has no supported type"),
        ({"type": "string"}, "a string needs a pattern from ^ to $"),
        ({"type": "string", "pattern": "^a"}, "a string needs a pattern from ^ to $"),
        ({"type": "string", "pattern": "a$"}, "a string needs a pattern from ^ to $"),
        ({"type": "string", "pattern": '^a"$'}, "JSON escapes"),
        ({"type": "string", "pattern": "^a$", "format": "date"}, "the schema holds format"),
        ({"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.1}, "only numbers"),
        ({"type": "number", "minimum": 0, "maximum": 1.5, "multipleOf": 0.1}, "only numbers"),
        ({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5}, "only numbers"),
        ({}, "a value has no supported type"),
    ],
)
def test_another_schema_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_gbnf(object_of(a=schema))


def test_an_object_with_other_properties_is_refused() -> None:
    with pytest.raises(ValueError, match="without other properties"):
        to_gbnf('{"type": "object", "properties": {}, "required": []}')


def test_an_optional_first_property_is_refused() -> None:
    schema = json.loads(object_of(a={"enum": [1]}))
    schema["required"] = []
    with pytest.raises(ValueError, match="the first property must be required"):
        to_gbnf(json.dumps(schema))


def test_the_patterns_of_a_schema_take_bounded_work_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regular, "_MOST_WORK", 100_000)
    pattern = {"type": "string", "pattern": "^[a-z]{9}$"}
    to_gbnf(object_of(a=pattern))
    with pytest.raises(ValueError, match="too much work"):
        to_gbnf(object_of(a=pattern, b=pattern, c=pattern, d=pattern, e=pattern, f=pattern))
