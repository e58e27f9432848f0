"""The word error rate of the benchmark of the voices."""

from __future__ import annotations

import pytest

from benchmarks.speech import word_errors, words


@pytest.mark.parametrize(
    ("expected", "heard", "errors"),
    [
        ("sell it now", "sell it now", 0),
        ("sell it now", "sell in now", 1),
        ("sell it now", "sell now", 1),
        ("sell it now", "so sell it now then", 2),
        ("sell it now", "", 3),
        ("", "sell", 1),
    ],
)
def test_each_changed_added_or_missing_word_is_an_error(
    expected: str, heard: str, errors: int
) -> None:
    assert word_errors(expected.split(), heard.split()) == errors


def test_words_have_no_marks() -> None:
    said = words("Sell A A P L at twenty-five, don't wait.")
    assert " ".join(said) == "sell a a p l at twenty five don't wait"
