"""Checks of schemas and of the answers to them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.engines import answer_check
from llm_sidecar.engines.answer_check import check_schema, follows
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.services.client_schemas import guidance_of

LEG = {
    "type": "object",
    "properties": {"ticker": {"type": "string"}, "quantity": {"type": "integer", "minimum": 1}},
    "required": ["ticker", "quantity"],
}
ORDER = {
    "type": "object",
    "properties": {
        "side": {"enum": ["buy", "sell"]},
        "legs": {"type": "array", "items": {"$ref": "#/$defs/leg"}, "maxItems": 2},
    },
    "required": ["side", "legs"],
    "$defs": {"leg": LEG},
}
FINE: dict[str, Any] = {"side": "buy", "legs": [{"ticker": "ABC", "quantity": 5}]}


def follows_order(answer: Any) -> bool:
    return follows(guidance_of(ORDER), json.dumps(answer))


@pytest.mark.parametrize("indent", [None, 2])
def test_white_space_does_not_matter(indent: int | None) -> None:
    assert follows(guidance_of(ORDER), f"\n{json.dumps(FINE, indent=indent)} ")


def test_the_order_of_properties_does_not_matter_at_any_depth() -> None:
    assert follows_order({"legs": [{"quantity": 5, "ticker": "ABC"}], "side": "sell"})


def test_an_open_object_may_have_further_properties_in_any_place() -> None:
    schema = guidance_of(LEG | {"additionalProperties": True})
    assert follows(schema, '{"quantity": 1, "note": "x", "ticker": "ABC"}')


@pytest.mark.parametrize(
    "answer",
    [
        FINE | {"side": "hold"},
        FINE | {"note": "x"},
        {"side": "buy"},
        FINE | {"legs": [{"ticker": "ABC", "quantity": 0}]},
        FINE | {"legs": [{"ticker": "ABC", "quantity": "5"}]},
        FINE | {"legs": FINE["legs"] * 3},
        [],
    ],
)
def test_an_answer_that_breaks_its_schema_does_not_follow_it(answer: Any) -> None:
    assert follows_order(FINE)
    assert not follows_order(answer)


@pytest.mark.parametrize(
    "answer", ["", "Fine.", json.dumps(FINE)[:-1], "[" * 100_000, f"{json.dumps(FINE)} {{}}"]
)
def test_a_text_that_is_not_one_json_value_does_not_follow_a_schema(answer: str) -> None:
    assert not follows(guidance_of(ORDER), answer)


def test_a_long_answer_is_checked_in_pieces() -> None:
    schema = guidance_of({"type": "array", "items": {"type": "string"}})
    assert follows(schema, json.dumps(["word " * 5000]))
    assert not follows(schema, json.dumps(["word " * 5000, 1]))


def test_an_answer_that_takes_too_long_to_check_does_not_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_check, "_SECONDS", -1.0)
    assert not follows_order(FINE)


def test_a_keyword_that_is_not_supported_is_named() -> None:
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        check_schema('{"type": "array", "uniqueItems": true}')
