"""Text that ends before a stop text."""

from __future__ import annotations

import pytest

from llm_sidecar.models.base import TokenLogprob
from llm_sidecar.services.answers import (
    Finished,
    Part,
    TextAnswer,
    TextPart,
    ToolCallPart,
    joined,
)
from tests.unit.fakes import completion


def texts(stop: tuple[str, ...], *pieces: str) -> list[str]:
    """What each piece completes, and finally the rest."""
    answer = TextAnswer(stop)
    parts = [answer.feed(piece) for piece in pieces] + [answer.finish()]
    return ["".join(part.text for part in some) for some in parts]


def token(text: str) -> TokenLogprob:
    return TokenLogprob(0, text.encode(), -1.0)


def test_without_stop_texts_each_piece_is_a_part() -> None:
    answer = TextAnswer()
    assert answer.feed("a", [token("a")]) == [TextPart("a", (token("a"),))]
    assert answer.feed("") == []
    # A token of half a character has no text yet.
    assert answer.feed("", [token("b")]) == [TextPart("", (token("b"),))]
    assert answer.finish() == []
    assert not answer.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (("END",), ["one END two"], ["one ", ""]),
        (("END",), ["one E", "ND two"], ["one ", "", ""]),
        (("END",), ["one E", "N", "x"], ["one ", "", "ENx", ""]),
        (("END",), ["one EN"], ["one ", "EN"]),
        (("aab",), ["aa", "aab"], ["", "aa", ""]),
        (("\n\n", "."), ["a\n", ".\n\n"], ["a", "\n", ""]),
        # The first one counts, whichever it is.
        (("cd", "b"), ["abcd"], ["a", ""]),
    ],
)
def test_text_ends_before_the_first_stop_text(
    stop: tuple[str, ...], pieces: list[str], expected: list[str]
) -> None:
    assert texts(stop, *pieces) == expected


def test_nothing_comes_after_a_stop_text() -> None:
    answer = TextAnswer(("b",))
    assert answer.feed("abc") == [TextPart("a")]
    assert answer.stopped
    assert answer.feed("def") == []
    assert answer.finish() == []


def test_tokens_come_with_the_text_that_they_begin_in() -> None:
    answer = TextAnswer(("END",))
    one, two, three, four = map(token, ("one ", "EN", "x", ""))
    assert answer.feed("one ", [one]) == [TextPart("one ", (one,))]
    assert answer.feed("EN", [two]) == []
    assert answer.feed("x", [three]) == [TextPart("ENx", (two, three))]
    # The end of the turn has no text.
    assert answer.feed("", [four]) == []
    assert answer.finish() == [TextPart("", (four,))]


def test_tokens_of_the_stop_text_are_left_out() -> None:
    answer = TextAnswer(("END",))
    one, two, three = map(token, ("ä", " E", "ND"))
    assert answer.feed("ä", [one]) == [TextPart("ä", (one,))]
    assert answer.feed(" E", [two]) == [TextPart(" ", (two,))]
    assert answer.feed("ND", [three]) == []
    assert answer.finish() == []


def test_an_answer_in_many_parts_is_joined_to_one_part_for_each_item() -> None:
    end = Finished("tool_calls", completion(""))
    parts: list[Part] = [
        TextPart("", (), (token("c"),), "The prompt."),
        TextPart("a", (token("a"),)),
        TextPart("", (token("b"),)),
        ToolCallPart(0, "one", "sell", ""),
        ToolCallPart(0, "one", "sell", '{"size"'),
        ToolCallPart(0, "one", "sell", ":1}"),
        ToolCallPart(1, "two", "sell", "{}"),
        TextPart("b"),
        end,
    ]
    assert list(joined(parts)) == [
        TextPart("a", (token("a"), token("b")), (token("c"),), "The prompt."),
        ToolCallPart(0, "one", "sell", '{"size":1}'),
        ToolCallPart(1, "two", "sell", "{}"),
        TextPart("b"),
        end,
    ]
    assert list(joined([])) == []
