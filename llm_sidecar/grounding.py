"""Grounding: whether a proposal's ticker and the numbers in its rationale come from its context.

A number may be written differently than in the context: `191.1` and `191.10`, `1,200`, `1 200` and
`1.200`, `2.5k` and `2500`, `1e5`, `7 %` and `0.07`, the digits of any script. If a text can be read
in more than one way (`1,200` is also 1.2 in German, and 1 and 200 in a list), each interpretation
counts. The sign is ignored. A rounded number (`191` for `191.10`), a number in words and the
quotient of a fraction do not count.

A ticker counts if the characters beside it are neither letters nor digits: `AAPL` in `$AAPL`,
`AAPL.O` and `AAPL:US`. Case matters for one or two letters, because `a`, `it` and `on` are words.

The time of each function is proportional to the length of the context.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import Any, Final, NamedTuple

GROUNDED: Final = "true"
"""What `describe` returns if all fields are grounded."""
FIELDS: Final = ("ticker", "rationale")
"""The fields of a proposal that can be ungrounded."""

_OWN_NUMBERS: Final = ("new_stop_pct", "new_target_pct", "confidence")
_LONGEST_TICKER: Final = 12
_LONGEST_NUMBER: Final = 12
"""Maximum length of a ticker or number in the guidance, so that proposals stay bounded."""
_TICKERS_OF_DIGITS: Final = range(4, 7)
"""Lengths of tickers without letters, as East Asian exchanges use them."""
_CASE_MATTERS: Final = 2
"""Tickers of at most this many letters must be in the context with the same case."""

_SUFFIXES: Final = {
    "%": -2, "percent": -2, "pct": -2,
    "k": 3, "thousand": 3, "m": 6, "mn": 6, "million": 6, "b": 9, "bn": 9, "billion": 9,
}  # fmt: skip
"""The power of ten for each suffix of a number."""
_RUN: Final = re.compile(
    r"(\.?)([0-9]+(?:(?:[.,' ]|[eE][+-]?)[0-9]+)*)"
    rf"(?:\s?((?ai:{'|'.join(sorted(_SUFFIXES, key=len, reverse=True))}))(?![^\W_]))?"
)
"""Groups of digits with separators between them, and a suffix."""
_GROUPS: Final = re.compile(r"([0-9]+)([^0-9]*)")
_THOUSANDS: Final = 3
"""Digits."""
_MOST_GROUPS: Final = 5
"""Maximum number of digit groups before the decimal point."""
_LONGEST_EXPONENT: Final = 3
_EXACT: Final = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)

_WORD: Final = re.compile(r"\^?[A-Za-z0-9]+(?:[./_-][A-Za-z0-9]+)*(?:=[FXfx]\b)?")
"""In `ES=F` and `EURUSD=X` the equals sign is part of the ticker; elsewhere it separates key and
value."""
_PART: Final = re.compile(r"[A-Za-z0-9]{2,}")
_ENGLISH_CAPITALS: Final = {"A", "I"}
"""English words in capitals, which do not show that the context writes tickers in capitals."""

_SPELLINGS: Final = {"\u2019": "'", "\u02bc": "'", "\u066b": ".", "\u066c": ",", "\u066a": "%"}
"""Apostrophes and Arabic marks, for which Unicode's tables have no ASCII form."""


def ungrounded_fields(proposal: Mapping[str, Any], context: str) -> tuple[str, ...]:
    """The fields of a proposal that are not grounded in its context, in the order of `FIELDS`.

    Args:
        proposal: a valid one. Its own distances and confidence may be in its rationale too.
        context: the prompt of the proposal.
    """
    text = _plain(context)
    known = _numbers(text)
    known |= {abs(Decimal(str(proposal[f]))) for f in _OWN_NUMBERS if proposal.get(f) is not None}
    grounded = {
        "ticker": _has_ticker(text, proposal["ticker"]),
        "rationale": all(run.is_made_of(known) for run in _runs(_plain(proposal["rationale"]))),
    }
    return tuple(field for field in FIELDS if not grounded[field])


def describe(ungrounded: tuple[str, ...]) -> str:
    """`true`, or the ungrounded fields separated by commas, as in the header and the column."""
    return ",".join(ungrounded) or GROUNDED


def numbers_in(context: str, most: int) -> list[str]:
    """The first distinct numbers of a context, in ASCII, in their notation, without a sign.

    A text is grounded if its only digits are these numbers, and neither a digit nor a full stop
    separates two of them. A number with separators of thousands is returned as its groups of
    digits, which such a text may join again.
    """
    found: dict[str, None] = {}
    for run in _runs(_plain(context)):
        for number in run.most_numbers():
            if len(number) <= _LONGEST_NUMBER:
                found[number] = None
        if len(found) >= most:
            break
    return list(found)[:most]


def tickers_in(context: str, most: int) -> list[str]:
    """The first distinct words of a context that may be tickers, in capital letters.

    If the context has words in capitals, only those; otherwise all words; without any word, the
    numbers that may be tickers.
    """
    text = _plain(context)
    capitals: dict[str, None] = {}
    words: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for word in _words(text):
        if not any(map(str.isalpha, word)):
            if word.isdigit() and len(word) in _TICKERS_OF_DIGITS:
                numbers[word] = None
        elif word == word.upper():
            capitals[word] = None
        elif len(word) > _CASE_MATTERS:
            words[word.upper()] = None
        if len(capitals) >= most:
            break
    selected = capitals if capitals.keys() - _ENGLISH_CAPITALS else capitals | words or numbers
    return list(selected)[:most]


def _words(text: str) -> Iterator[str]:
    """The words that are short enough for a ticker, and the parts of a word such as `AAPL-long`
    unless all of it is in capitals."""
    for match in _WORD.finditer(text):
        word = match[0]
        if not _stands_alone(text, match.start(), match.end()):
            continue
        if len(word) <= _LONGEST_TICKER:
            yield word
        if len(word) > _LONGEST_TICKER or word != word.upper():
            yield from (part for part in _PART.findall(word) if len(part) <= _LONGEST_TICKER)


def _has_ticker(text: str, ticker: str) -> bool:
    if len(ticker) > _CASE_MATTERS:
        text, ticker = text.upper(), ticker.upper()
    start = text.find(ticker)
    while start >= 0:
        if _stands_alone(text, start, start + len(ticker)):
            return True
        start = text.find(ticker, start + 1)
    return False


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (_joins(text[max(0, start - 1) : start]) or _joins(text[end : end + 1]))


def _joins(char: str) -> bool:
    """Whether a character belongs to the word beside it. Letters without case, such as Chinese, do
    not: there is no space between the words."""
    return char.isdigit() or char.lower() != char.upper()


def _numbers(text: str) -> set[Decimal]:
    """Every number that a text has in some interpretation."""
    return {
        number
        for run in _runs(text)
        for first in range(len(run.groups))
        for _, number in run.numbers_from(first)
    }


class _Run(NamedTuple):
    """Groups of digits with separators between them: one number or several.

    Attributes:
        groups: the groups of digits.
        marks: the separator after each group; empty after the last one.
        point: whether a full stop comes first, as in `.5` or `No.5`.
        power: the power of ten of the suffix, for the last number; 0 without a suffix.
    """

    groups: list[str]
    marks: list[str]
    point: bool
    power: int

    def numbers_from(self, first: int) -> Iterator[tuple[int, Decimal]]:
        """The numbers that can begin with this group, each with the index of the next group."""
        if not self._may_break(first):
            return
        if self._begins_with_point() and first == 0:
            yield 1, Decimal(f"0.{self.groups[0]}")
        for end, digits in self._spellings_from(first):
            if not self._may_break(end):
                continue
            number = Decimal(digits)
            yield end, number
            if end == len(self.groups):
                if self.power:
                    yield end, number.scaleb(self.power, _EXACT)
            elif self.marks[end - 1][0] in "eE" and len(self.groups[end]) <= _LONGEST_EXPONENT:
                exponent = int(self.marks[end - 1][1:] + self.groups[end])
                if self._may_break(end + 1):
                    yield end + 1, number.scaleb(exponent, _EXACT)

    def _spellings_from(self, first: int) -> Iterator[tuple[int, str]]:
        """Integers and decimals that begin with this group, without separators of thousands; each
        with the index of the next group."""
        digits, end, used = self.groups[first], first + 1, ""
        while True:
            mark = self.marks[end - 1]
            # The last group of thousands has three digits: `1,00` alone is not yet `1,00,000`.
            if not used or len(self.groups[end - 1]) == _THOUSANDS:
                yield end, digits
                if mark and mark in ".," and mark != used:
                    yield end + 1, f"{digits}.{self.groups[end]}"
            if not mark or mark not in ".,' " or mark != (used or mark):
                return
            if len(self.groups[end]) not in (2, 3) or end - first == _MOST_GROUPS:
                return
            if not used and (len(digits) > _THOUSANDS or digits.startswith("0")):
                return
            digits, end, used = digits + self.groups[end], end + 1, mark

    def is_made_of(self, known: set[Decimal]) -> bool:
        """Whether every number is known in some interpretation."""
        reached = {0}
        for first in range(len(self.groups)):
            if first in reached:
                reached |= {end for end, number in self.numbers_from(first) if number in known}
        return len(self.groups) in reached

    def most_numbers(self) -> Iterator[str]:
        """The numbers of the interpretation with the most numbers."""
        number = "0." if self._begins_with_point() else ""
        for index, group in enumerate(self.groups, 1):
            number += group
            if self._may_break(index):
                yield number
                number = ""
            else:
                number += "."

    def _begins_with_point(self) -> bool:
        return self.point and self._may_break(1)

    def _may_break(self, index: int) -> bool:
        """Whether one number may end before this group and another begin with it.

        A single full stop is a decimal point; several of them are separators of a date or a list.
        """
        if index == 0 or self.marks[index - 1] != ".":
            return True
        return self.marks[index] == "." or (index > 1 and self.marks[index - 2] == ".")


def _runs(text: str) -> Iterator[_Run]:
    for match in _RUN.finditer(text):
        digits_and_marks = _GROUPS.findall(match[2])
        yield _Run(
            [digits for digits, _ in digits_and_marks],
            [mark for _, mark in digits_and_marks],
            bool(match[1]),
            _SUFFIXES[match[3].lower()] if match[3] else 0,
        )


def _plain(text: str) -> str:
    """The text with digits of every script, full-width letters and all kinds of spaces in ASCII."""
    # By character: normalising a whole text takes quadratic time in its number of accents.
    return text if text.isascii() else text.translate(_PlainChars())


class _PlainChars(dict[int, str]):
    """The ASCII form of each character, computed on first use."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char.isdecimal():
            plain = str(unicodedata.decimal(char))
        else:
            plain = _SPELLINGS.get(char) or unicodedata.normalize("NFKC", char)
        if unicodedata.category(char) == "No":
            # The digits of `½` and `²` are not part of the number before them.
            plain = f" {plain} "
        self[code] = plain
        return plain
