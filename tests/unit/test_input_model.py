"""Models of input from outside, and errors that quote nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from llm_sidecar.input_model import (
    InputModel,
    QueryInteger,
    Text,
    TextOrObject,
    check_length,
    longest_payload,
    summary,
)

MARK = "ZXQMARK"


class Trade(InputModel):
    model_config = ConfigDict(extra="forbid")

    known_keys = frozenset({"rationale"})
    not_text = frozenset({"sound"})

    name: str = Field("", max_length=10, pattern="^[^q]*$")
    size: int = 0
    said: TextOrObject = ""
    details: dict[str, Any] = Field(default_factory=dict)
    sound: str = ""


def locations(error: ValidationError) -> list[tuple[int | str, ...]]:
    return [entry["loc"] for entry in error.errors()]


@pytest.mark.parametrize("make", [Trade.model_validate, lambda given: Trade(**given)])
@pytest.mark.parametrize(
    ("given", "location"),
    [
        ({"name": f"{MARK}\0"}, ("name",)),
        ({"name": MARK.encode()}, ("name",)),
        ({"name": MARK * 2}, ("name",)),
        ({"name": f"{MARK}q"}, ("name",)),
        ({"size": MARK}, ("size",)),
        ({"said": f"{MARK}\ud83d"}, ("said",)),
        ({"said": [MARK]}, ("said",)),
        ({"said": {MARK: f"{MARK}\x85"}}, ("said", "*")),
        ({"details": {MARK: {"rationale": f"{MARK}\x9f"}}}, ("details", "*", "rationale")),
        ({"details": {MARK: [{f"{MARK}\udfff": 1}]}}, ("details", "*", 0, "*")),
        ({"details": MappingProxyType({MARK: f"{MARK}\0"})}, ("details", "*")),
        ({"details": {7: MARK}}, ("details", "*")),
        ({"details": MARK}, ("details",)),
        ({MARK: MARK}, ("*",)),
    ],
)
def test_an_error_names_the_field_and_quotes_nothing(
    make: Callable[[Mapping[str, Any]], Trade],
    given: dict[str, Any],
    location: tuple[int | str, ...],
) -> None:
    with pytest.raises(ValidationError) as caught:
        make(given)
    assert locations(caught.value) == [location]
    shown = "".join(traceback.format_exception(caught.value))
    # The last frame is this test's own.
    for text in (str(caught.value), repr(caught.value), summary(caught.value), shown):
        assert MARK not in text
    assert MARK not in str(caught.value.errors())


@pytest.mark.parametrize(
    "payload",
    [
        MARK,
        f'["{MARK}"]',
        f'{{"size": "{MARK}"}}',
        f'{{"details": {{"{MARK}": "\\u0000"}}}}',
        f'{{"said": "\\ud83d{MARK}"}}',
        f'{{"{MARK}": 1}}',
    ],
)
def test_an_error_of_a_message_quotes_nothing(payload: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Trade.model_validate_json(payload)
    assert MARK not in str(caught.value)
    assert MARK not in summary(caught.value)


def test_every_fault_is_named_in_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        Trade.model_validate({"size": MARK, "said": 7, MARK: 1})
    assert summary(caught.value) == (
        "size: Input should be a valid integer, unable to parse string as an integer; "
        "said: Input should be a string or an object; "
        "*: Unknown field; the known ones are name, size, said, details, sound"
    )


def test_what_is_valid_is_kept_as_it_was() -> None:
    given = {"name": "価格\t\n\r\u202e", "said": {"\u0378": [None, 1.5]}, "sound": "\0"}
    trade = Trade.model_validate(given)
    assert trade.model_dump(exclude_unset=True) == given
    assert Trade.model_validate_json('{"said": "x"}').said == "x"
    assert Trade.model_validate(trade) is trade


def test_a_field_may_be_as_long_as_the_limit_says() -> None:
    trade = Trade(name="価格", said={"a": "価格"}, sound="x" * 100)
    check_length(trade, 10)
    with pytest.raises(ValidationError) as caught:
        check_length(trade, 9)
    assert locations(caught.value) == [("said",)]
    with pytest.raises(ValidationError) as caught:
        check_length(trade, 1)
    assert locations(caught.value) == [("name",), ("said",), ("details",)]


def test_the_longest_message_holds_a_text_and_an_object_in_every_script() -> None:
    text = "🚀" * 1000
    trade = Trade.model_construct(said=text, details={"a": text[:-9]})
    check_length(trade, 1000)
    escaped = ascii(text)[1:-1].replace("\\U0001f680", "\\ud83d\\ude80")
    assert 2 * len(escaped) < longest_payload(1000) < 3 * len(escaped) + (1 << 14)


def test_a_parameter_is_text() -> None:
    adapter = TypeAdapter[str](Text)
    assert adapter.validate_python("価格") == "価格"
    for value in ("a\0", "\ud83d", b"a"):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


class Note(InputModel):
    model_config = ConfigDict(extra="forbid")

    words: int = 0


class Noted(InputModel):
    notes: list[Note] = Field(default_factory=list)


def test_an_error_of_one_model_in_another_says_where() -> None:
    with pytest.raises(ValidationError) as caught:
        Noted.model_validate({"notes": [{"words": MARK}]})
    assert summary(caught.value) == (
        "notes.0.words: Input should be a valid integer, unable to parse string as an integer"
    )
    with pytest.raises(ValidationError) as caught:
        Noted.model_validate({"notes": [{}, {MARK: 1}]})
    assert locations(caught.value) == [("notes", 1, "*")]


def test_an_error_is_one_of_the_model_and_has_no_input() -> None:
    with pytest.raises(ValidationError) as caught:
        Trade.model_validate({"said": 7})
    with pytest.raises(ValidationError) as too_long:
        check_length(Trade(said="abc"), 2)
    assert str(caught.value) == (
        "1 validation error for Trade\nsaid\n  Input should be a string or an object "
        "[type=text_or_object]"
    )
    assert str(too_long.value) == (
        "1 validation error for Trade\nsaid\n  Text is too long; MAX_PROMPT_CHARS takes 2 "
        "characters [type=string_too_long]"
    )
    for error in (caught.value, too_long.value):
        assert [entry["input"] for entry in error.errors()] == [None]


def test_the_longest_message_is_24_times_the_longest_text_and_a_little() -> None:
    assert longest_payload(1000) == 24_000 + 16_384


def test_many_unknown_fields_are_one_error() -> None:
    with pytest.raises(ValidationError) as caught:
        Trade.model_validate({f"{MARK}{number}": number for number in range(50_000)})
    assert locations(caught.value) == [("*",)]
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("sent", ["5.0", "+5", "1_000", "", " 5"])
def test_an_integer_in_a_query_has_decimal_digits_only(sent: str) -> None:
    integer = TypeAdapter(QueryInteger)
    assert integer.validate_python("-12") == -12
    with pytest.raises(ValidationError) as caught:
        integer.validate_python(sent)
    (error,) = caught.value.errors(include_url=False, include_context=False)
    assert (error["type"], error["msg"]) == (
        "int_parsing",
        "Input should be an integer in decimal digits",
    )
