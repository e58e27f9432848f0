"""The text of a critique: whole sentences, at most three."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import pytest

from llm_sidecar.models.base import Completion, Delta
from llm_sidecar.services.critique import whole_sentences

Reason = Literal["stop", "length"]


class Stream:
    """A generation of given texts.

    Attributes:
        taken: how many of them were taken.
        closed: whether the generation has ended.
    """

    def __init__(self, texts: Sequence[str], reason: Reason = "stop") -> None:
        self.taken = 0
        self.closed = False
        self._texts, self._reason = texts, reason

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            for number, text in enumerate(self._texts, 1):
                self.taken = number
                last = number == len(self._texts)
                yield Delta(
                    text,
                    "hermes/fake",
                    completion_tokens=number,
                    finish_reason=self._reason if last else None,
                )
        finally:
            self.closed = True


async def texts_of(texts: Sequence[str], reason: Reason = "stop") -> list[str]:
    return [delta.text async for delta in whole_sentences(Stream(texts, reason).deltas())]


async def completed(texts: Sequence[str], reason: Reason = "stop") -> Completion:
    return Completion.of([one async for one in whole_sentences(Stream(texts, reason).deltas())])


async def test_text_is_passed_on_sentence_by_sentence() -> None:
    assert await texts_of(["The stop", " is 2", ".", "5%. The", " target", " is near."]) == [
        *("", "", "", "The stop is 2.5%.", "", " The target is near.")
    ]


@pytest.mark.parametrize(
    ("texts", "text", "taken"),
    [
        (["One.", " Two.", " Three.", " Four.", " Five."], "One. Two. Three.", 4),
        (["One. Two. Three. Four. Five.", " Six."], "One. Two. Three.", 1),
        (list("One. Two. Three. Four."), "One. Two. Three.", 18),
        (["一。", "二。", "三。", "四。"], "一。二。三。", 3),
    ],
)
async def test_the_generation_is_stopped_after_its_third_sentence(
    texts: list[str], text: str, taken: int
) -> None:
    stream = Stream(texts, "length")
    deltas = [delta async for delta in whole_sentences(stream.deltas())]
    found = Completion.of(deltas)
    assert (found.text, found.finish_reason, found.completion_tokens) == (text, "stop", taken)
    assert (stream.taken, stream.closed) == (taken, True)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


@pytest.mark.parametrize(
    ("texts", "reason", "text", "ended"),
    [
        (["One. ", "Two."], "stop", "One. Two.", "stop"),
        (["One. ", "Two"], "stop", "One. Two", "stop"),
        (["no full stop \n"], "stop", "no full stop", "stop"),
        ([""], "stop", "", "stop"),
        ([""], "length", "", "length"),
        # The bound cuts a sentence: half of it is left out.
        (["One. ", "Two. Do not"], "length", "One. Two.", "length"),
        (["One. ", "Do not"], "length", "One.", "length"),
        (["One. ", "Two."], "length", "One. Two.", "length"),
        # So it is if the bound is in the middle of a number or after an abbreviation.
        (["One. ", "The stop is at 182."], "length", "One.", "length"),
        (["One. ", "Buy in the U.S."], "length", "One.", "length"),
        (["One. ", "It gains approx."], "length", "One.", "length"),
        (["The stop is at 182."], "length", "The stop is at 182.…", "length"),
        (["One. ", "The stop is at 182."], "stop", "One. The stop is at 182.", "stop"),
        # Without a whole sentence, the reader sees that it is cut.
        (["Do not "], "length", "Do not…", "length"),
        # A third sentence that ends at the bound is whole.
        (["One. Two. Three."], "length", "One. Two. Three.", "stop"),
    ],
)
async def test_a_text_that_ends_earlier_ends_with_a_whole_sentence_where_it_has_one(
    texts: list[str], reason: Reason, text: str, ended: str
) -> None:
    found = await completed(texts, reason)
    assert (found.text, found.finish_reason) == (text, ended)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
async def test_the_text_does_not_depend_on_how_it_arrives(size: int) -> None:
    text = 'The ratio is 2.5 vs. 1.0. "Why?" he asks... and waits. It is the U.S. again! No.'
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    found = await completed(parts)
    assert found.text == text.removesuffix(" No.")


async def test_closing_it_closes_the_generation() -> None:
    stream = Stream(["One. Two", "."])
    sentences = whole_sentences(stream.deltas())
    assert (await anext(sentences)).text == "One."
    await sentences.aclose()
    assert stream.closed
