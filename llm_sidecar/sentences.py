"""Where a sentence ends.

The rules are for what language models write in English; the full stops of Chinese, Japanese and
Hindi end a sentence too. In doubt a sentence goes on, because half of a sentence can say the
opposite of the whole.
"""

from __future__ import annotations

import re
from typing import Final

_STOPS: Final = ".!?…"
_CJK_STOPS: Final = r"\u3002\uff01\uff1f\u0964"
_CLOSING: Final = r"[\"'\u201d\u2019\u00bb)\]*_`\u300d\u300f\uff09]*+"
"""Quotation marks, brackets and Markdown after a full stop."""
# Possessive, and only at the first of several full stops, so that a long row of them stays linear.
_RUN: Final = rf"(?<![{_STOPS}])[{_STOPS}]++{_CLOSING}"
_END: Final = re.compile(rf"{_RUN}(?=\s)|[{_CJK_STOPS}]++{_CLOSING}|\n\s*\n")
"""A full stop before white space, one of a script without spaces, or an empty line."""
_LAST: Final = re.compile(rf"{_RUN}(?=\s*+\Z)")
_ABBREVIATIONS: Final = frozenset(
    (
        *("e.g", "i.e", "cf", "etc", "vs", "approx", "est", "avg", "incl", "excl", "resp", "fig"),
        *("mr", "mrs", "ms", "dr", "prof", "inc", "corp", "co", "ltd", "bros"),
        *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
    )
)
_INITIALS: Final = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
"""The letters of "U.S.", "a.m." or "J.", without the last full stop."""
_LONGEST: Final = 16
"""Characters before a full stop that may be an abbreviation."""
_LETTER: Final = re.compile(r"[^\W\d_]")


def sentence_end(
    text: str, start: int = 0, *, complete: bool = False, cut: bool = False
) -> int | None:
    """The index after the sentence that begins at `start`, or None if it does not end in the text.

    White space after a sentence belongs to the next one. Text without a letter, such as the
    number of a list item, is not a sentence of its own.

    Args:
        text: the text so far.
        start: where the sentence begins.
        complete: whether no more text follows. Otherwise only what follows shows whether a full
            stop ends the sentence.
        cut: whether the complete text was cut off, so that a full stop at its end may belong to an
            abbreviation or be the point of a number.
    """
    first = _LETTER.search(text, start)
    if first is None:
        return None
    for found in _END.finditer(text, first.start()):
        if found[0].isspace():
            return found.start()
        if found[0][0] not in _STOPS or _is_end(text, found.start(), found.end()):
            return found.end()
    last = _LAST.search(text, first.start()) if complete else None
    if last is None or (cut and _may_go_on(text, last.start(), last.end())):
        return None
    return last.end()


def _is_end(text: str, stop: int, end: int) -> bool:
    """Whether the full stop at `stop`, with what closes until `end`, ends a sentence."""
    following = text[end:].lstrip()[:1]
    if not following:
        return False
    if following.islower() and text[stop:end] != ".":
        # An ellipsis, or a quotation in the middle of a sentence.
        return False
    return not _is_abbreviation(text, stop, end)


def _may_go_on(text: str, stop: int, end: int) -> bool:
    """Whether the full stop at the end of a text that is cut off may not end the sentence."""
    is_point = text[stop:end] == "." and text[stop - 1].isdigit()
    return is_point or _is_abbreviation(text, stop, end)


def _is_abbreviation(text: str, stop: int, end: int) -> bool:
    """Whether the full stop at `stop`, with what closes until `end`, belongs to a word."""
    word = re.split(r"[^\w.]", text[max(0, stop - _LONGEST) : stop])[-1]
    return text[stop:end] == "." and (
        word.lower() in _ABBREVIATIONS or _INITIALS.fullmatch(word) is not None
    )
