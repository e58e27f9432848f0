"""Where tokens begin in a text."""

from __future__ import annotations

import pytest

from osiris.openai.text_offsets import TextOffsets


def offsets(text: str, *tokens: str | bytes) -> list[int]:
    found = TextOffsets()
    found.add(text)
    return [found.of(one if isinstance(one, bytes) else one.encode()) for one in tokens]


def test_each_token_begins_where_the_one_before_ends() -> None:
    assert offsets("Long ABC.", "Long", " ABC", ".") == [0, 4, 8]


def test_a_control_token_takes_no_characters() -> None:
    assert offsets("Long ABC.", "<s>", "Long", "<s>", " ABC", "<s>") == [0, 0, 4, 4, 8]


def test_the_space_before_a_text_takes_no_character() -> None:
    assert offsets("Long ABC", "<s>", " Long", " ABC") == [0, 0, 4]
    assert offsets("Long ABC", " ", "Long", " ABC") == [0, 0, 4]
    assert offsets(" Long ABC", " ", " Long", " ABC") == [0, 0, 5]


def test_a_split_character_counts_once() -> None:
    assert offsets("Äb", b"\xc3", b"\x84", "b") == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "tokens", "found"),
    [
        # Invalid UTF-8 is replaced, some characters later than the decoder of its bytes does.
        ("\N{REPLACEMENT CHARACTER}ab", (b"\xff", "a", "b"), [0, 1, 2]),
        # A normalizer has joined two characters.
        ("e\N{COMBINING ACUTE ACCENT} is", ("é", " is"), [0, 2]),
        # A control token in the text is escaped with a space.
        ("a <s> b", ("a", " <", " s", ">", " b"), [0, 1, 3, 4, 5]),
        ("a <s> b", ("a", " ", "< s", ">", " b"), [0, 1, 2, 4, 5]),
    ],
)
def test_tokens_that_spell_the_text_otherwise_are_passed_over(
    text: str, tokens: tuple[str | bytes, ...], found: list[int]
) -> None:
    assert offsets(text, *tokens) == found


def test_text_may_come_in_pieces_that_end_within_a_token() -> None:
    found = TextOffsets()
    found.add("Lo")
    assert [found.of(b"Lo")] == [0]
    found.add("ng A")
    assert [found.of(b"ng"), found.of(b" ABC")] == [2, 4]
    found.add("BC.")
    assert found.of(b".") == 8


def test_the_rest_of_a_text_can_be_skipped() -> None:
    found = TextOffsets()
    found.add("Long ABC")
    assert found.of(b"Other") == 0
    found.skip()
    found.add(" is")
    assert found.of(b" is") == 8
