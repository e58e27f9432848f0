"""Functions and calls of a request."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from llm_sidecar.services.tools import Tool
from osiris.openai.schemas.functions import Function, NamedTool
from osiris.openai.tool_input import Calls, choice_of, named_tools, tools_of

PRICE, CLOSE = Tool("price_of", "The price.", {"type": "object"}), Tool("close")


def named(*names: str) -> list[NamedTool]:
    return [NamedTool(type="function", name=name) for name in names]


def param_of(error: pytest.ExceptionInfo[RequestValidationError]) -> str:
    (fault,) = error.value.errors()
    return str(fault["loc"][-1])


def test_functions_become_tools() -> None:
    price = Function(name="price_of", description="The price.", parameters={"type": "object"})
    assert tools_of([price, Function(name="close")], 1000) == (PRICE, CLOSE)


@pytest.mark.parametrize("kind", ["string", ["object", "null"], None])
def test_arguments_are_an_object(kind: Any) -> None:
    with pytest.raises(ValidationError, match="The type of the arguments should be object"):
        Function(name="close", parameters={"type": kind})


def test_the_named_tools_keep_their_order() -> None:
    assert named_tools([PRICE, CLOSE], named("close", "price_of"), "tools") == (PRICE, CLOSE)
    assert named_tools([PRICE, CLOSE], named("close"), "tools") == (CLOSE,)
    with pytest.raises(RequestValidationError) as caught:
        named_tools([PRICE], named("price_of", "close"), "tool_choice.tools")
    assert param_of(caught) == "tool_choice.tools"


def test_a_model_that_must_call_needs_a_tool() -> None:
    assert choice_of(None, []) == "auto"
    assert choice_of("none", [CLOSE]) == "none"
    assert choice_of("required", [CLOSE]) == "required"
    with pytest.raises(RequestValidationError) as caught:
        choice_of("required", [])
    assert param_of(caught) == "tool_choice"


def test_a_result_belongs_to_an_earlier_call() -> None:
    calls = Calls()
    assert calls.text("c-1", "close", "{ }") == '{"name":"close","arguments":{}}'
    result = {"role": "user", "content": "Result of close:\ndone"}
    assert calls.result("c-1", "done", "input[1]") == result
    with pytest.raises(RequestValidationError) as caught:
        calls.result("c-2", "done", "input[2].call_id")
    assert param_of(caught) == "input[2].call_id"
