"""Which strings are text, and the errors for others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.text import (
    MAX_DEPTH,
    MAX_VALUES,
    cleaned,
    find_fault,
    find_length_fault,
    require_text,
)

CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"]
SURROGATES = ["\ud800", "\udbff", "\udc00", "\udfff"]
TEXTS = [
    "",
    "\t\n\r",
    "Long ABC from 100, now 112.5.",
    "\u202eright to left\u202c \u2066isolated\u2069 \u200f\u061c",  # bidirectional marks
    "\u0378 \U000e0fff",  # unassigned
    "\ue000 \U0010fffd",  # private use
    "\uffff \U0010ffff",  # noncharacters
    "\u200b\ufeff\u2028\u2029\u00ad\u00a0",
    "शॉर्ट बेचो, 価格 240.50, اشترِ, 🚀👩‍💻",
]
KNOWN = frozenset({"rationale"})


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_every_script_passes(text: str) -> None:
    assert find_fault(text) is None
    assert find_fault({text: [text, {"a": text}]}) is None


@pytest.mark.parametrize("character", CONTROLS + SURROGATES, ids=lambda char: f"U+{ord(char):04X}")
def test_control_characters_and_half_surrogate_pairs_are_no_text(character: str) -> None:
    kind = "text_unicode" if character in SURROGATES else "text_control"
    for value, location in (
        (f"価格{character}", ()),
        ({"rationale": f"価格{character}"}, ("rationale",)),
        ({f"価格{character}": 1}, ("*",)),
        ({"mine": [0, {"rationale": ["", f"価格{character}"]}]}, ("*", 1, "rationale", 1)),
        ([{f"価格{character}": 1}], (0, "*")),
    ):
        fault = find_fault(value, KNOWN)
        assert fault is not None
        assert (fault.kind, fault.location) == (kind, location)
        assert "its character 3 is" in fault.message
        assert character not in fault.message


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("nan"), "finite_number"),
        (float("-inf"), "finite_number"),
        (10**4300, "integer_too_long"),
        ({1: "a"}, "not_json"),
        ({"a", "b"}, "not_json"),
        (b"a", "not_json"),
        (object(), "not_json"),
    ],
    ids=["nan", "infinity", "integer", "key", "set", "bytes", "object"],
)
def test_what_is_no_json_is_found_in_an_object(value: object, kind: str) -> None:
    fault = find_fault({"a": [value]})
    assert fault is not None
    assert fault.kind == kind


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value} if levels % 2 else [value]
    return value


@pytest.mark.parametrize("levels", [MAX_DEPTH, MAX_DEPTH - 1])
def test_an_object_may_be_nested_as_deep_as_it_says(levels: int) -> None:
    assert find_fault(nested(levels)) is None


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, MAX_DEPTH + 2, 50_000])
def test_an_object_that_is_nested_deeper_is_found(levels: int) -> None:
    fault = find_fault(nested(levels))
    assert fault is not None
    assert (fault.kind, fault.location) == ("too_deep", ())


def test_an_object_may_have_as_many_values_as_it_says() -> None:
    assert find_fault({"a": [1] * (MAX_VALUES - 1)}) is None
    fault = find_fault({"a": [1] * MAX_VALUES})
    assert fault is not None
    assert (fault.kind, fault.location) == ("too_many_values", ())


def test_an_object_that_holds_itself_is_found() -> None:
    value: dict[str, Any] = {}
    value["a"] = value
    assert find_fault(value) is not None


def test_an_argument_may_be_as_long_as_it_says() -> None:
    require_text(4, text="価格🚀価", proposal={}, context=None)
    with pytest.raises(InvalidRequest, match=r"^text: Text is too long; .* 4 characters"):
        require_text(4, text="価格🚀価格")
    # {"a":"価格"} has ten.
    require_text(10, proposal={"a": "価格"})
    with pytest.raises(InvalidRequest, match=r"^proposal: Object is too long; .* 9 char"):
        require_text(9, proposal={"a": "価格"})


def test_an_argument_that_is_no_text_is_named_and_not_quoted() -> None:
    with pytest.raises(InvalidRequest) as caught:
        require_text(100, proposal={"SECRET": ["SECRET\0"]})
    assert caught.value.detail.startswith("proposal.*.0: ")
    assert "SECRET" not in caught.value.detail


def test_what_a_model_wrote_is_cleaned_and_not_refused() -> None:
    assert cleaned("价格\0 up\x1b[31m\r\n\ttwo\ud83d") == "价格\ufffd up\ufffd[31m\r\n\ttwo\ufffd"
    assert cleaned(TEXTS[-1]) == TEXTS[-1]


CONTROL = (
    "Text should have no control characters but tab, newline and carriage return; "
    "its character 2 is one"
)
SURROGATE = "Text should be Unicode; its character 3 is half a surrogate pair"


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("a\0", ("text_control", CONTROL, ())),
        ("ab\ud83d", ("text_unicode", SURROGATE, ())),
        (b"a", ("string_type", "Input should be a valid string", ())),
        (bytearray(b"a"), ("string_type", "Input should be a valid string", ())),
        ({"a\0": 1}, ("text_control", f"Key: {CONTROL}", ("*",))),
        ({7: 1}, ("not_json", "Keys of an object should be text", ("*",))),
        ({"rationale": float("inf")}, ("finite_number", "Number should be finite", ("rationale",))),
        ([1, {"a": {1, 2}}], ("not_json", "Value should be JSON", (1, "*"))),
        ({"a": 1 << 14_000}, ("integer_too_long", "Integer has too many digits", ("*",))),
        ({"a": -(1 << 14_000)}, ("integer_too_long", "Integer has too many digits", ("*",))),
    ],
)
def test_each_fault_says_what_is_wrong(value: object, fault: tuple[object, ...]) -> None:
    assert find_fault(value, KNOWN) == fault


def test_too_much_of_an_object_says_how_much_there_may_be() -> None:
    assert find_fault([0] * (MAX_VALUES + 1)) == (
        "too_many_values",
        "Object should hold at most 32768 values",
        (),
    )
    deep: object = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    assert find_fault(deep) == ("too_deep", "Object should be nested at most 64 deep", ())


def test_an_integer_may_have_as_many_bits_as_it_says() -> None:
    assert find_fault({"a": (1 << 14_000) - 1}) is None


def test_what_is_no_text_and_no_object_has_no_fault() -> None:
    for value in (None, 1, 1.5, True):
        assert find_fault(value) is None
        assert find_length_fault(value, 1) is None


@pytest.mark.parametrize("value", [[1, 22], (1, 22), {"a": 1}])
def test_an_object_is_as_long_as_its_compact_json(value: object) -> None:
    length = len(json.dumps(value, separators=(",", ":")))
    assert find_length_fault(value, length) is None
    assert find_length_fault(value, length - 1) == (
        "object_too_long",
        f"Object is too long; MAX_PROMPT_CHARS takes {length - 1} characters of JSON",
        (),
    )


def test_a_text_is_as_long_as_its_characters() -> None:
    assert find_length_fault("価格", 2) is None
    assert find_length_fault({"価": "格"}, 9) is None
    assert find_length_fault("価格", 1) == (
        "string_too_long",
        "Text is too long; MAX_PROMPT_CHARS takes 1 characters",
        (),
    )
