"""Tools: the instructions for the model, and the schema of its answer."""

from __future__ import annotations

import pytest

from llm_sidecar.services.tools import (
    Tool,
    answer_schema,
    call_text,
    instructions,
    result_text,
)

PRICE = Tool("price_of", "The price.", {"type": "object", "properties": {"t": {"type": "string"}}})
CLOSE = Tool("close")
TOOLS = (PRICE, CLOSE)


def alternative(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


CALL_PRICE = alternative(name={"enum": ["price_of"]}, arguments=PRICE.parameters)
CALL_CLOSE = alternative(
    name={"enum": ["close"]},
    arguments={"type": "object", "properties": {}, "additionalProperties": False},
)


def test_the_model_may_call_a_tool_or_answer_with_text() -> None:
    assert answer_schema(TOOLS, "auto", None) == {
        "anyOf": [CALL_PRICE, CALL_CLOSE, alternative(text={"type": "string"})]
    }
    assert instructions(TOOLS, "auto", has_schema=False) == (
        'To call a function, answer with one JSON object {"name": the function\'s name, '
        '"arguments": its arguments}. Otherwise answer with {"text": the answer}.\n'
        "Functions:\n"
        '{"name":"price_of","description":"The price.",'
        '"parameters":{"type":"object","properties":{"t":{"type":"string"}}}}\n'
        '{"name":"close","parameters":{"properties":{},"additionalProperties":false}}'
    )


def test_an_answer_without_a_call_may_have_a_schema() -> None:
    schema = {"type": "array"}
    assert answer_schema((CLOSE,), "auto", schema) == {
        "anyOf": [CALL_CLOSE, alternative(answer=schema)]
    }
    text = instructions((CLOSE,), "auto", has_schema=True)
    assert 'Otherwise answer with {"answer": the answer}.' in text


@pytest.mark.parametrize(
    ("tools", "calls"), [(TOOLS, {"anyOf": [CALL_PRICE, CALL_CLOSE]}), ((CLOSE,), CALL_CLOSE)]
)
def test_the_model_has_to_call(tools: tuple[Tool, ...], calls: dict[str, object]) -> None:
    assert answer_schema(tools, "required", {"type": "array"}) == calls
    text = instructions(tools, "required", has_schema=True)
    assert text.startswith("Answer with the call of a function: one JSON object")
    assert "Otherwise" not in text


def test_parameters_that_refer_to_themselves_move_into_definitions() -> None:
    tree = {
        "$schema": "draft",
        "$defs": {"node": {"items": {"$ref": "#/$defs/node"}}},
        "properties": {"root": {"$ref": "#/$defs/node"}},
    }
    schema = answer_schema((CLOSE, Tool("grow", "", tree)), "required", None)
    calls = schema["anyOf"]
    assert calls[1]["properties"]["arguments"] == {"$ref": "#/$defs/tool1"}
    pointer = "#/$defs/tool1/$defs/node"
    assert schema["$defs"] == {
        "tool1": {
            "type": "object",
            "$defs": {"node": {"items": {"$ref": pointer}}},
            "properties": {"root": {"$ref": pointer}},
        }
    }


def test_earlier_calls_are_written_as_the_model_writes_them() -> None:
    assert call_text("price_of", '{ "t": "Ä" }') == '{"name":"price_of","arguments":{"t":"Ä"}}'
    assert call_text("price_of", "no JSON") == '{"name":"price_of","arguments":no JSON}'
    assert result_text("price_of", "191.1") == "Result of price_of:\n191.1"
