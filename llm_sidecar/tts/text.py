"""Splits a text into parts that are spoken one by one: at sentences, then clauses, then words.

It splits at white space only, so `182.40`, `1,234`, `BRK.B` and `ES=F` stay whole. Each sentence is
then written out as it is `spoken`. The parts joined with spaces are that text with normalized white
space.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from llm_sidecar.tts.wording import spoken

MAX_PART: Final = 280
"""Characters."""
_FIRST_PART: Final = 70
"""Characters after which the first part may end at a clause, so that speech starts soon: Piper
needs 0.4 s for them on one core."""
_SHORT_PART: Final = 60
"""Characters below which a later part takes the next sentence too."""

_SENTENCE_PAUSE, _CLAUSE_PAUSE = 0.3, 0.12
_CLOSING: Final = "\"'”’»)]}*_"
_SENTENCE_ENDS: Final = (".", "!", "?", "…", "。", "！", "？")
_CLAUSE_ENDS: Final = (",", ";", ":", "—", "–", "，", "；", "：", "、")
_BREAKS: Final = frozenset(
    "after and are as at because before but by for from has have if in into is of on or over since"
    " so than that to until was were when where which while will with".split()
)
"""Words before which a clause is best split."""
_FULL_WIDTH: Final = frozenset("\uff05\uff0e\uff0b\uff0d\uff04\uffe5\uffe1")
"""The signs of percent, plus, minus and currencies, and the point, in Chinese and Japanese."""
_DASHES: Final = frozenset({"-", "--", "–", "—"})
_INITIALS: Final = re.compile(r"(?:[^\W\d_]\.)+")
_ENUMERATOR: Final = re.compile(r"\d{1,3}\.")
_ABBREVIATIONS: Final = frozenset(
    "adj. al. approx. apr. assn. aug. ave. avg. bros. ca. cf. co. corp. dec. dept. dr. eq. esp."
    " est. etc. ex. feb. fig. ft. gen. gov. hon. hr. hrs. inc. incl. intl. jan. jr. jul. jun. ltd."
    " max. min. mr. mrs. ms. mt. mtg. no. nos. nov. oct. p. pct. ph.d. pp. pres. prev. prof. pt. q."
    " rep. resp. rev. sec. sen. sep. sept. sr. st. vol. vs.".split()
)


def plain(text: str) -> str:
    """The text without characters that cannot be spoken: control and private ones become spaces;
    invisible ones that only format (soft hyphens, direction marks) are removed.

    Digits of other scripts become those of ASCII, because the voices leave them out.
    """
    return "".join(map(_plain_character, text)).strip()


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if character in _FULL_WIDTH:
        return unicodedata.normalize("NFKC", character)
    if category == "Cf":
        return ""
    # Blank lines are kept: they end a paragraph.
    return " " if category.startswith("C") and character != "\n" else character


def speakable(text: str) -> bool:
    """Whether there is a letter or a digit to speak."""
    return any(map(str.isalnum, text))


def split(text: str) -> list[str]:
    """The parts, of `MAX_PART` characters at most; only longer words are split.

    The first part is short, so that speech starts soon. Each of the others is one sentence, or
    several short ones.
    """
    sentences = [spoken(sentence) for sentence in _sentences(plain(text))]
    if not sentences:
        return []
    first, *rest = _split_long(sentences[0], _FIRST_PART)
    if rest and not pause_after(first):
        first, rest = _at_break(first, rest)
    rest = list(_split_long(" ".join(rest), MAX_PART)) if rest else []
    for sentence in sentences[1:]:
        rest.extend(_split_long(sentence, MAX_PART))
    return [first, *_pack(rest, MAX_PART, enough=_SHORT_PART)]


def clauses(part: str) -> list[str]:
    """The sentences and clauses of a part, each with its mark at its end."""
    return list(
        _groups(part.split(), lambda words, i: _ends_sentence(words, i) or _ends_clause(words, i))
    )


def phrases(part: str, limit: int) -> list[str]:
    """Groups of clauses of at most `limit` characters, with at least one clause each."""
    return list(_pack(clauses(part), limit))


def mark_of(clause: str) -> str:
    """The punctuation mark that ends a clause; empty if there is none."""
    ending = clause.rstrip(_CLOSING)
    return ending[-1] if ending.endswith(_SENTENCE_ENDS + _CLAUSE_ENDS) else ""


def pause_after(part: str) -> float:
    """Seconds of silence after a part that is not the last one."""
    ending = part.rstrip(_CLOSING)
    if ending.endswith(_SENTENCE_ENDS):
        return _SENTENCE_PAUSE
    return _CLAUSE_PAUSE if ending.endswith(_CLAUSE_ENDS) else 0.0


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield from _groups(paragraph.split(), _ends_sentence)


def _clauses(sentence: str) -> Iterator[str]:
    return _groups(sentence.split(), _ends_clause)


def _groups(words: list[str], ends: Callable[[list[str], int], bool]) -> Iterator[str]:
    start = 0
    for i in range(len(words)):
        if i + 1 == len(words) or ends(words, i):
            yield " ".join(words[start : i + 1])
            start = i + 1


def _ends_clause(words: list[str], i: int) -> bool:
    return words[i].rstrip(_CLOSING).endswith(_CLAUSE_ENDS)


def _ends_sentence(words: list[str], i: int) -> bool:
    """Whether a sentence ends with the word at `i`, which is not the last word."""
    word, following = words[i].rstrip(_CLOSING), words[i + 1]
    # A dot before a small letter, or a dash, never ends a sentence.
    if not word.endswith(_SENTENCE_ENDS) or following[0].islower() or following in _DASHES:
        return False
    if not word.endswith(".") or word.endswith(".."):
        return True
    word = word.lstrip("\"'“‘«([{*_$")
    starts_sentence = i == 0 or words[i - 1].rstrip(_CLOSING).endswith(_SENTENCE_ENDS)
    if starts_sentence and _ENUMERATOR.fullmatch(word):
        return False
    return not (_INITIALS.fullmatch(word) or word.lower() in _ABBREVIATIONS)


def _split_long(sentence: str, limit: int) -> Iterator[str]:
    """Splits a long sentence into pieces of as many clauses or words as fit, at least one word
    each."""
    if len(sentence) <= limit:
        yield sentence
        return
    pieces: list[str] = []
    for clause in _clauses(sentence):
        if len(clause) <= limit:
            pieces.append(clause)
        else:
            pieces.extend(_pack(_words(clause), limit))
    yield from _pack(pieces, limit)


def _at_break(first: str, rest: list[str]) -> tuple[str, list[str]]:
    """Makes a part that ends inside a clause end before a word such as "to", if there is one in its
    last two thirds, and not inside a number."""
    words = [*first.split(), rest[0].partition(" ")[0]]
    for i in range(len(words) - 1, len(words) // 3, -1):
        if words[i] in _BREAKS:
            return " ".join(words[:i]), [" ".join(words[i:-1]), *rest]
    return first, rest


def _words(clause: str) -> Iterator[str]:
    """The words; splits a word that is longer than a part, as in languages without spaces."""
    for word in clause.split():
        for start in range(0, len(word), MAX_PART):
            yield word[start : start + MAX_PART]


def _pack(pieces: Iterable[str], limit: int, *, enough: int | None = None) -> Iterator[str]:
    """Joins neighbouring pieces up to `limit` characters, until one has `enough`."""
    packed = ""
    for piece in pieces:
        wants_more = len(packed) < (limit if enough is None else enough)
        if packed and (not wants_more or len(packed) + 1 + len(piece) > limit):
            yield packed
            packed = piece
        else:
            packed = f"{packed} {piece}".strip()
    if packed:
        yield packed
