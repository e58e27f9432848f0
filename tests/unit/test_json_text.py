"""The end of a JSON value in streamed text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.json_text import FirstObject, JsonValue

VALUES: list[Any] = [
    {},
    [],
    {"a": [1, {"b": '}] \\ "'}], "c": None},
    [[], {"[": "]"}],
    'a "b" \\',
    "",
    -1.5e3,
    True,
    None,
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("rest", ["}", "]", ", 1", " ", "\n{}"])
def test_a_value_ends_where_its_json_ends(value: Any, rest: str) -> None:
    source = json.dumps(value)
    for cut in range(len(source) + 1):
        found = JsonValue()
        pieces = (source[:cut], source[cut:] + rest, rest)
        assert "".join(map(found.take, pieces)) == source
        assert found.ended


@pytest.mark.parametrize("source", ['{"a": "}', "[1", '"a\\\\\\"', "12", "tru"])
def test_a_value_that_may_go_on_has_not_ended(source: str) -> None:
    found = JsonValue()
    assert found.take(source) == source
    assert not found.ended


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_only_the_first_object_of_a_text_is_kept(size: int) -> None:
    wanted = '{"a":{"b":"} \\" {"},"c":[]}'
    text = f"Sure: [1] ```json\n{wanted}\n``` and {{}}"
    kept = FirstObject()
    assert "".join(kept.feed(text[at : at + size]) for at in range(0, len(text), size)) == wanted
    assert kept.is_whole


def test_half_an_object_is_not_whole() -> None:
    kept = FirstObject()
    assert kept.feed('{"a": "}') == '{"a": "}'
    assert not kept.is_whole
