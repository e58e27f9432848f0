"""Dates, times, ratios and other groups of numbers."""

from __future__ import annotations

import re
from typing import Final

from llm_sidecar.tts.wording.numbers import (
    cardinal,
    decimal,
    digit_words,
    ordinal,
    two_digits,
    year,
)
from llm_sidecar.tts.wording.rule import Rule, final_dot, space_before_letter

_MONTHS: Final = (
    "January February March April May June July August September October November December"
).split()
_ISO_DATE: Final = re.compile(
    r"(?<![\w./-])([0-9]{4})-([0-9]{2})-([0-9]{2})(?:T(?=[0-9])|(?![\w-]))"
)
_US_DATE: Final = re.compile(r"(?<![\w./-])([0-9]{1,2})/([0-9]{1,2})/([0-9]{4})(?![\w/])")
_NO_NUMBER: Final = r"(?![\w.,:%/-][0-9]|[\w:%/])"
"""Not in the middle of a longer number, price or date."""
_MONTH_DAY: Final = re.compile(
    rf"(?<!\w)(Jan|Feb|Mar|Apr|June?|July?|Aug|Sept?|Oct|Nov|Dec|{'|'.join(_MONTHS)})\.?"
    rf"\s+([0-9]{{1,2}})(?:st|nd|rd|th)?{_NO_NUMBER}"
    rf"(?:(,?)\s+([12][0-9]{{3}}){_NO_NUMBER})?"
)
_HALF: Final = r"\s?([AaPp])(?:[Mm](?!\w)|\.[Mm](?:\.|(?!\w)))"
_TIME: Final = re.compile(
    r"(?<![\w:.,/-])([01]?[0-9]|2[0-3])"
    rf"(?::([0-5][0-9])(?::([0-5][0-9]))?(?:{_HALF})?|{_HALF})(?![0-9:])"
)
_RATIO: Final = re.compile(r"(?<![\w:.])([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?)(?![\w:])")
_CODE: Final = re.compile(r"(?<![\w.-])[0-9]+(?:-[0-9]+){2,}(?![\w-])")
"""Longer than a range, such as a telephone number."""
_ORDINAL: Final = re.compile(r"(?<![\w.,])([0-9]{1,15})(?:st|nd|rd|th)(?!\w)")


def _iso_date(match: re.Match[str]) -> str:
    words = _date(match[1], match[2], match[3])
    return f"{words} " if words and match[0].endswith("T") else words or match[0]


def _us_date(match: re.Match[str]) -> str:
    """The month comes first, unless it cannot be one."""
    one, other, of_year = match.groups()
    return _date(of_year, one, other) or _date(of_year, other, one) or match[0]


def _month_day(match: re.Match[str]) -> str:
    month = next(n for n, name in enumerate(_MONTHS, 1) if name.startswith(match[1][:3]))
    return _date(match[4] or "", str(month), match[2], match[3] or "") or match[0]


def _date(of_year: str, month: str, day: str, mark: str = "") -> str:
    """The words of a date, with a mark before the year if there is one; empty for no such day."""
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return ""
    words = f"{_MONTHS[int(month) - 1]} {ordinal(str(int(day)))}"
    return f"{words}{mark} {year(of_year)}" if of_year else words


def _time(match: re.Match[str]) -> str:
    hour, minute, second, half_after_minutes, half_after_hour = match.groups()
    half = half_after_minutes or half_after_hour
    words = [cardinal(str(int(hour)))]
    if minute == "00" and not half:
        words.append("o'clock" if 1 <= int(hour) <= 12 else "hundred")
    elif minute and minute != "00":
        words.append(two_digits(minute))
    if second and second != "00":
        plural = "" if second == "01" else "s"
        words.append(f"and {cardinal(str(int(second)))} second{plural}")
    if half:
        words.append(f"{half.upper()} M")
    end = final_dot(match) if match[0].endswith(".") else space_before_letter(match)
    return " ".join(words) + end


RULES: Final[tuple[Rule, ...]] = (
    (_ISO_DATE, _iso_date),
    (_US_DATE, _us_date),
    (_MONTH_DAY, _month_day),
    (_CODE, lambda match: " dash ".join(map(digit_words, match[0].split("-")))),
    (_TIME, _time),
    (_RATIO, lambda match: f"{decimal(match[1])} to {decimal(match[2])}"),
    (_ORDINAL, lambda match: ordinal(match[1])),
)
