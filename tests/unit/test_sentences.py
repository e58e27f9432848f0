"""Where a sentence ends, in the text of a language model."""

from __future__ import annotations

import pytest

from llm_sidecar.sentences import sentence_end


def split(text: str) -> list[str]:
    """The sentences of a whole text; the last one may have no end."""
    found, start = [], 0
    while (end := sentence_end(text, start, complete=True)) is not None:
        found.append(text[start:end].strip())
        start = end
    rest = text[start:].strip()
    return [*found, rest] if rest else found


@pytest.mark.parametrize(
    "sentences",
    [
        ["The stop is wide.", "The target is near.", "Reject it."],
        # Numbers and tickers
        ["A stop of 2.5% against a target of 4.0% is thin.", "It is.", "So reject."],
        ["BRK.B closed at 412.50.", "S&P 500.", "The ratio is 1.5:1."],
        ["It trades at 182.", "The stop is at 171."],
        # Abbreviations
        ["Use a tighter stop, e.g. 2%.", "Or i.e. none."],
        ["Reward vs. risk is thin, approx. half.", "Fine."],
        ["It beat Apple Inc. and Alphabet.", "Ask Mr. Smith.", "Done."],
        ["Stops, targets, etc. are missing.", "Add them."],
        # Initials
        ["The U.S. economy slows.", "J. Powell spoke at 2 p.m. today.", "The market fell."],
        # In doubt a sentence goes on.
        ["It fell in the U.S. The dollar rose.", "Fine."],
        # Ellipses
        ["It rises... and falls.", "Then nothing..."],
        ["It waits… then falls.", "Yes…", "No."],
        # Questions, exclamations, quotations, brackets, Markdown
        ["Why so wide?", "Sell!", "Really?!", "Yes."],
        ['"Why?" he asks.', '"It is fine."', "He said “no.”", "Good."],
        ["It is fine (for now.)", "Or not (at 2.5).", "**Stop.**", "*Sell.*", "[Now.]"],
        # Lists
        ["1. The stop is wide.", "2. The target is near.", "3. Reject."],
        ["- The stop is wide", "- The target is near."],
        # Lower case
        ["the stop is wide.", "the target is near.", "ok."],
        # Other scripts
        ["目標は近い。", "「損切りは遠い。」", "良い\uff01", "本当\uff1f", "はい"],
        ["यह ठीक है।", "बेचो।"],
        ["Der Stop ist weit.", "Überprüfe ihn."],
        # No full stop
        ["no full stop at all"],
        ["The stop is wide.", "The target"],
    ],
)
def test_a_text_has_these_sentences(sentences: list[str]) -> None:
    separator = "\n\n" if sentences[0].startswith("- ") else " "
    assert split(separator.join(sentences)) == sentences
    assert split("\n" + separator.join(sentences) + " \n") == sentences


@pytest.mark.parametrize("text", ["", " ", "...", "1. 2. 3.", "42", "\n\n", "?! ...", "。", "-- "])
def test_what_has_no_letter_is_no_sentence(text: str) -> None:
    assert sentence_end(text) is None
    assert sentence_end(text, complete=True) is None


@pytest.mark.parametrize(
    ("so_far", "end"),
    [
        ("The stop is 2.", None),
        ("The stop is 2. ", None),
        ("The stop is 2.5", None),
        ("The stop is wide. T", 17),
        ("The stop is wide.\nt", 17),
        ('He said "no." T', 13),
        ('He said "no." t', None),
        ("Wait... T", 7),
        ("Wait... t", None),
        ("See the U.S. T", None),
        ("Good。", 5),
        ("The stop\n\n", 8),
        ("The stop\n", None),
    ],
)
def test_before_the_end_of_the_text_what_follows_decides(so_far: str, end: int | None) -> None:
    assert sentence_end(so_far) == end


def test_the_end_of_the_text_is_that_of_its_last_sentence() -> None:
    assert sentence_end("The stop is 2.", complete=True) == 14
    assert sentence_end("It is in the U.S.", complete=True) == 17
    assert sentence_end('He said "no." \n', complete=True) == 13
    assert sentence_end("The stop is", complete=True) is None


def test_a_full_stop_where_a_text_is_cut_may_be_a_point_or_an_abbreviations() -> None:
    assert sentence_end("The stop is 2.", complete=True, cut=True) is None
    assert sentence_end("It is in the U.S.", complete=True, cut=True) is None
    assert sentence_end("It gains approx.", complete=True, cut=True) is None
    assert sentence_end("The stop is wide.", complete=True, cut=True) == 17
    assert sentence_end("(It is 2.)", complete=True, cut=True) == 10
    assert sentence_end("Is it 2?", complete=True, cut=True) == 8


def test_a_sentence_begins_where_the_caller_says() -> None:
    text = "One. Two. Three."
    assert sentence_end(text, 0) == 4
    assert sentence_end(text, 4) == 9
    assert sentence_end(text, 9) is None
    assert sentence_end(text, 9, complete=True) == 16


@pytest.mark.parametrize("part", [".", "a.", "1. ", "!?", "\n", ". ", "x" * 50 + ".", '."'])
def test_a_long_text_that_repeats_itself_takes_no_longer_than_its_length(part: str) -> None:
    """A quadratic search would take minutes."""
    sentence_end(part * (300_000 // len(part)), complete=True)
