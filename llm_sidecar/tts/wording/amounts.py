"""Numbers with their signs, currencies, scales and units, and ranges of two."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from llm_sidecar.tts.wording.numbers import cardinal, decimal
from llm_sidecar.tts.wording.rule import Rule, space_before_letter


class Currency(NamedTuple):
    """Singular and plural of a currency, and of its hundredth if that is spoken."""

    one: str
    several: str
    hundredth: str = ""
    hundredths: str = ""


_CURRENCIES: Final = {
    "US$": Currency("U S dollar", "U S dollars", "cent", "cents"),
    "HK$": Currency("Hong Kong dollar", "Hong Kong dollars", "cent", "cents"),
    "C$": Currency("Canadian dollar", "Canadian dollars", "cent", "cents"),
    "A$": Currency("Australian dollar", "Australian dollars", "cent", "cents"),
    "$": Currency("dollar", "dollars", "cent", "cents"),
    "€": Currency("euro", "euros", "cent", "cents"),
    "£": Currency("pound", "pounds", "penny", "pence"),
    "¥": Currency("yen", "yen"),
    "₹": Currency("rupee", "rupees"),
    "₩": Currency("won", "won"),
    "₿": Currency("bitcoin", "bitcoin"),
}
_UNITS: Final = {
    "%": ("percent", "percent"),
    "‰": ("per mille", "per mille"),
    "bp": ("basis point", "basis points"),
    "bps": ("basis point", "basis points"),
    "x": ("times", "times"),
    "×": ("times", "times"),
    "¢": ("cent", "cents"),
}
"""Singular and plural of each."""
_SCALES: Final = {
    "k": "thousand",
    "m": "million",
    "mm": "million",
    "mn": "million",
    "mln": "million",
    "b": "billion",
    "bn": "billion",
    "t": "trillion",
    "tn": "trillion",
    "thousand": "thousand",
    "million": "million",
    "billion": "billion",
    "trillion": "trillion",
}
_MONEY_ONLY: Final = frozenset({"m", "b", "t"})
"""Scales that need a currency: elsewhere `5m` is five minutes."""
_SIGNS: Final = {"+": "plus ", "-": "minus ", "−": "minus ", "±": "plus or minus ", "": ""}

_NUMBER: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
_SIGN: Final = r"(?<![\w%.)\]])[+\-−±]"
"""Not the hyphen of `F-16` or `3-5`."""
_VERSION: Final = re.compile(r"(?<![0-9.])[0-9]+(?:\.[0-9]+){2,}(?![0-9])")
_COMMA: Final = re.compile(r"(?<=[a-z]),(?=[a-z])")
"""Between two numbers that are words now."""


def _amount(n: int, sign: str) -> str:
    """The pattern of the first or second amount of a range."""
    return (
        rf"(?P<about{n}>[~≈]\s?)?(?P<sign{n}>{sign})?"
        rf"(?P<currency{n}>(?<![A-Za-z])(?:US|HK|C|A)?\$|[€£¥₹₩₿])?"
        rf"(?P<inner_sign{n}>(?<=[$€£¥₹₩₿])[+\-−])?(?P<number{n}>{_NUMBER})"
        rf"(?:(?P<scale{n}>(?:[KkMmBbTt]|mm|MM|mn|mln|bn|Bn|BN|tn|TN)(?![A-Za-z0-9])"
        r"|\s(?:thousand|million|billion|trillion)(?![A-Za-z]))"
        rf"|(?P<unit{n}>\s?[%‰]|\s?bps?(?![A-Za-z0-9])|[xX×](?![A-Za-z0-9])|¢))?"
    )


_AMOUNTS: Final = re.compile(
    rf"{_amount(1, _SIGN)}(?:(?:[-–—]|\s[-–]\s){_amount(2, '(?!)')}(?!-?[0-9]|[-/:][0-9]))?"
)


class _Amount(NamedTuple):
    """A number and what stands around it.

    Attributes:
        before: what is said before it: "about", a sign.
        currency, scale, unit: as they are written, or empty.
    """

    before: str
    currency: str
    number: str
    scale: str
    unit: str

    @classmethod
    def read(cls, match: re.Match[str], n: int) -> _Amount:
        sign = match[f"sign{n}"] or match[f"inner_sign{n}"] or ""
        return cls(
            ("about " if match[f"about{n}"] else "") + _SIGNS[sign],
            match[f"currency{n}"] or "",
            match[f"number{n}"],
            (match[f"scale{n}"] or "").strip(),
            (match[f"unit{n}"] or "").strip().lower(),
        )

    def words(self) -> str:
        said = self._scale()
        if self.currency:
            return self.before + self._money(said)
        # A letter that is not a scale here stays.
        letter = f" {self.scale}" if self.scale and not said else ""
        unit = f" {_UNITS[self.unit][self.number != '1']}" if self.unit else ""
        return self.before + decimal(self.number) + said + letter + unit

    def bare(self) -> str:
        """Without what the end of the range says for both."""
        return self.before + decimal(self.number)

    def _scale(self) -> str:
        if not self.scale or (self.scale in _MONEY_ONLY and not self.currency):
            return ""
        return f" {_SCALES[self.scale.lower()]}"

    def _money(self, scale: str) -> str:
        currency = _CURRENCIES[self.currency]
        whole, _, fraction = self.number.replace(",", "").partition(".")
        if scale or self.unit or len(fraction) != 2 or not currency.hundredth:
            is_one = self.number == "1" and not scale
            unit = f" {_UNITS[self.unit][1]}" if self.unit else ""
            name = currency.one if is_one else currency.several
            return f"{decimal(self.number)}{scale} {name}{unit}"
        large = f"{cardinal(whole or '0')} {currency.one if whole == '1' else currency.several}"
        name = currency.hundredth if fraction == "01" else currency.hundredths
        small = f"{cardinal(str(int(fraction)))} {name}"
        if fraction == "00":
            return large
        return small if whole in ("", "0") else f"{large} and {small}"


def _amounts(match: re.Match[str]) -> str:
    """An amount, or a range of two."""
    first = _Amount.read(match, 1)
    words = first.words()
    if match["number2"] is not None:
        words = _range(first, _Amount.read(match, 2))
    # "RSI14" and "5G" are two words each.
    before = match.string[max(0, match.start() - 1) : match.start()]
    return f"{' ' * before.isalpha()}{words}{space_before_letter(match)}"


def _range(first: _Amount, last: _Amount) -> str:
    """A unit that only the end of a range has is said once: "3-5%", "$180-185", "$5-10M"."""
    last = last._replace(currency=last.currency or first.currency)
    shares_unit = not (first.unit or first.scale) and (last.unit or last.scale or last.currency)
    return f"{first.bare() if shares_unit else first.words()} to {last.words()}"


RULES: Final[tuple[Rule, ...]] = (
    (_VERSION, lambda match: " point ".join(map(cardinal, match[0].split(".")))),
    (_AMOUNTS, _amounts),
    (_COMMA, ", "),
)
