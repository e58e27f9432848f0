"""Abbreviations and signs between words."""

from __future__ import annotations

import re
from typing import Final

from llm_sidecar.tts.wording.rule import Rule, final_dot

_ABBREVIATIONS: Final = {
    "approx": "approximately",
    "avg": "average",
    "e.g": "for example",
    "est": "estimated",
    "etc": "et cetera",
    "excl": "excluding",
    "i.e": "that is",
    "incl": "including",
    "vs": "versus",
}
_ABBREVIATION: Final = re.compile(
    rf"(?<![\w.])(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})\.(?!\w)", re.IGNORECASE
)
_COMPARISONS: Final = {
    ">": "above",
    "<": "below",
    ">=": "at least",
    "≥": "at least",
    "<=": "at most",
    "≤": "at most",
}


def _abbreviation(match: re.Match[str]) -> str:
    return _ABBREVIATIONS[match[0][:-1].lower()] + final_dot(match)


RULES: Final[tuple[Rule, ...]] = (
    # the name of a field, as new_stop_pct
    (re.compile(r"(?<=[A-Za-z0-9])_+(?=[A-Za-z0-9])"), " "),
    (_ABBREVIATION, _abbreviation),
    (re.compile(r"(?<![\w.])vs(?![\w.])", re.IGNORECASE), "versus"),
    (re.compile(r"(?<![^\W0-9])pct(?:\.(?=\s+[a-z0-9]))?(?!\w)", re.IGNORECASE), "percent"),
    (re.compile(r"#(?=[0-9])|(?<!\w)Nos?\.\s*(?=[0-9])", re.IGNORECASE), "number "),
    (re.compile(r"\s?(?:→|[-=]>)\s?"), " to "),
    (re.compile(r"(?<!\w)@\s*(?=[-+.$€£¥0-9])"), "at "),
    (
        re.compile(r"\s?(>=|<=|[<>≥≤])\s?(?=[-+−.$€£¥]{0,3}[0-9])"),
        lambda match: f" {_COMPARISONS[match[1]]} ",
    ),
)
