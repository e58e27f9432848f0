"""Numbers as American English words; only the digits 0 to 9 are digits here."""

from __future__ import annotations

from typing import Final

_ONES: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
_TENS: Final = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_GROUPS: Final = ("", " thousand", " million", " billion", " trillion")
_MOST_DIGITS: Final = 3 * len(_GROUPS)
_ORDINALS: Final = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
"""Those that do not just append `th`."""


def digit_words(digits: str) -> str:
    """Each digit: `407` is "four zero seven"."""
    return " ".join(_ONES[int(digit)] for digit in digits)


def cardinal(digits: str) -> str:
    """A whole number: `1250` is "one thousand two hundred fifty".

    A number with a leading zero or of more than 15 digits is a code: read digit by digit.
    """
    if len(digits) > _MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return digit_words(digits)
    if digits == "0":
        return _ONES[0]
    words: list[str] = []
    for group in range((len(digits) - 1) // 3, -1, -1):
        value = int(digits) // 1000**group % 1000
        if value:
            words.append(_below_thousand(value) + _GROUPS[group])
    return " ".join(words)


def decimal(number: str) -> str:
    """A number as it is written, with commas or a point: `1,250.40` is "one thousand two hundred
    fifty point four zero"."""
    whole, point, fraction = number.replace(",", "").partition(".")
    words = [cardinal(whole)] if whole else []
    if point:
        words += ["point", digit_words(fraction)]
    return " ".join(words)


def ordinal(digits: str) -> str:
    """`25` is "twenty-fifth"."""
    words = cardinal(digits)
    start = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[start:]
    if last.endswith("y"):
        return f"{words[:-1]}ieth"
    return words[:start] + _ORDINALS.get(last, f"{last}th")


def year(digits: str) -> str:
    """A year of four digits: `2026` is "twenty twenty-six", `2005` "two thousand five"."""
    century, rest = digits[:2], digits[2:]
    if digits[0] == "0" or digits[1:3] == "00":
        return cardinal(digits)
    if rest == "00":
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {two_digits(rest)}"


def two_digits(digits: str) -> str:
    """The last two digits of a year, or minutes: `05` is "oh five"."""
    return f"oh {cardinal(digits[1])}" if digits[0] == "0" else cardinal(digits)


def _below_thousand(value: int) -> str:
    words = [f"{_ONES[value // 100]} hundred"] if value >= 100 else []
    rest = value % 100
    if rest >= 20:
        words.append(_TENS[rest // 10] + (f"-{_ONES[rest % 10]}" if rest % 10 else ""))
    elif rest:
        words.append(_ONES[rest])
    return " ".join(words)
