"""Reading of an answer that is a call or text, while its JSON is generated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.services.answers import Part, TextPart, ToolCallPart
from llm_sidecar.services.tool_answers import ToolAnswer


def read(*pieces: str, stop: tuple[str, ...] = (), is_whole: bool = True) -> list[list[Part]]:
    """The parts that each piece completes, and finally the rest."""
    answer = ToolAnswer(stop)
    parts = [list(answer.feed(piece)) for piece in pieces]
    return [*parts, list(answer.finish(is_whole=is_whole and not answer.stopped))]


def text_of(parts: list[list[Part]]) -> str:
    flat = [part for some in parts for part in some]
    assert all(isinstance(part, TextPart) for part in flat)
    return "".join(part.text for part in flat if isinstance(part, TextPart))


def call_of(parts: list[list[Part]]) -> tuple[str, str]:
    """The name and the arguments of the one call."""
    flat = [part for some in parts for part in some]
    calls = [part for part in flat if isinstance(part, ToolCallPart)]
    assert len(calls) == len(flat)
    assert len({(part.index, part.call_id, part.name) for part in calls}) == 1
    assert calls[0].call_id.startswith("call_")
    return calls[0].name, "".join(part.arguments for part in calls)


def test_text_streams_as_it_is_generated() -> None:
    parts = read('{"te', 'xt":"Ho', 'ld \\"it\\"', '."}')
    assert parts == [[], [TextPart("Ho")], [TextPart('ld "it"')], [TextPart(".")], []]


TEXTS = ["", "Hold.", 'a "b" \\ c\n\td', "ÄÖ€", "\U0001f600 and \U0001f600", "a\\", "{}[],:"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_is_the_same_wherever_its_json_is_cut(text: str, ascii_only: bool) -> None:
    source = json.dumps({"text": text}, ensure_ascii=ascii_only)
    assert text_of(read(*source)) == text
    for cut in range(len(source) + 1):
        assert text_of(read(source[:cut], source[cut:])) == text


def test_half_a_character_is_replaced() -> None:
    assert text_of(read('{"text":"a\\ud83d', 'b\\udc00"}')) == "a\N{REPLACEMENT CHARACTER}b" + (
        "\N{REPLACEMENT CHARACTER}"
    )


def test_control_characters_are_replaced() -> None:
    assert text_of(read('{"text":"a\\u0000b"}')) == "a\N{REPLACEMENT CHARACTER}b"


def test_text_ends_before_a_stop_text() -> None:
    answer = ToolAnswer(("END",))
    assert list(answer.feed('{"text":"one EN')) == [TextPart("one ")]
    assert list(answer.feed("D two")) == []
    assert answer.stopped
    assert list(answer.finish(is_whole=False)) == []


def test_a_call_streams_its_name_and_its_arguments() -> None:
    answer = ToolAnswer()
    assert list(answer.feed('{"name":"price')) == []
    assert list(answer.feed('_of","arguments":')) == []
    first, second = answer.feed('{"t":"A')
    assert isinstance(first, ToolCallPart)
    assert (first.index, first.name, first.arguments) == (0, "price_of", "")
    assert second == ToolCallPart(0, first.call_id, "price_of", '{"t":"A')
    (third,) = answer.feed('}"}}')
    assert third == ToolCallPart(0, first.call_id, "price_of", '}"}')
    assert list(answer.finish(is_whole=True)) == []
    assert answer.has_call


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"t": "AAPL"},
    {"a": [1, {"b": None}], "c": 'x"}]\\', "d": -1.5e3},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_call_is_the_same_wherever_its_json_is_cut(
    arguments: dict[str, Any], indent: int | None
) -> None:
    source = json.dumps({"name": "f", "arguments": arguments}, indent=indent)
    for cut in range(len(source) + 1):
        name, found = call_of(read(source[:cut], source[cut:]))
        assert (name, json.loads(found)) == ("f", arguments)


@pytest.mark.parametrize("value", [{"a": [1]}, [1, "]"], 't"e', 1.5, True, None])
def test_an_answer_with_a_schema_is_its_json(value: Any) -> None:
    source = json.dumps({"answer": value})
    for cut in range(len(source) + 1):
        assert json.loads(text_of(read(source[:cut], source[cut:]))) == value


def test_a_call_whose_keys_come_in_another_order_is_read_at_its_end() -> None:
    parts = read('{"arguments": {"t": 1}, ', '"name": "f"}')
    assert parts[:2] == [[], []]
    assert call_of(parts) == ("f", '{"t":1}')


@pytest.mark.parametrize(
    "source",
    ["", "Hello.", "{}", '{"name":"f"}', '{"text":1}', '{"text":"a', '{"name":"f","arguments":{'],
)
def test_an_answer_of_another_form_is_an_error(source: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        read(source)
    assert caught.value.retry_after == 1
    # One that was cut is not.
    read(source, is_whole=False)
