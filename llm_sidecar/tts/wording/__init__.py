"""Writes a text as a trader says it: numbers, prices, percent, tickers and abbreviations as words.

spoken("AAPL +3.2% to $182.40, RSI 78")
# "A A P L plus three point two percent to one hundred eighty-two dollars and forty cents,
#  R S I seventy-eight"

All else stays as it is, so plain words are unchanged, and what has been written out stays so.
"""

from __future__ import annotations

from llm_sidecar.tts.wording import abbreviations, amounts, capitals, dates

__all__ = ["spoken"]

# In this order: a date before its numbers, and letters last.
_RULES = (*abbreviations.RULES, *dates.RULES, *amounts.RULES, *capitals.RULES)


def spoken(text: str) -> str:
    """The text with numbers, signs, tickers and abbreviations as words; at most 16 times as long.

    Decimals are read digit by digit, dollars with two decimals as dollars and cents. Words in
    capitals are spelled if they have at most five letters and are not ordinary words.
    """
    for pattern, say in _RULES:
        text = pattern.sub(say, text)
    return text
