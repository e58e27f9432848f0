"""What a rule of wording is, and what the rules share."""

from __future__ import annotations

import re
from collections.abc import Callable

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
"""A pattern, and what is said instead of a match."""

CLOSING = "\"'”’»)]}*_"
"""What may follow the mark that ends a sentence."""


def space_before_letter(match: re.Match[str]) -> str:
    """A space if a letter follows the match, so that `5G` becomes two words."""
    return " " if match.string[match.end() : match.end() + 1].isalpha() else ""


def final_dot(match: re.Match[str]) -> str:
    """The dot of an abbreviation if it also ends the text."""
    return "" if match.string[match.end() :].strip(f" {CLOSING}") else "."
