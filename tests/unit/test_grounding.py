"""Grounding in a context: numbers in any notation, and tickers as words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Final

import pytest

from llm_sidecar import grounding
from llm_sidecar.grounding import numbers_in, tickers_in, ungrounded_fields

MOST: Final = 64


def proposal(ticker: str = "ABC", rationale: str = "No number.", **others: Any) -> dict[str, Any]:
    return {"ticker": ticker, "action": "pass", "confidence": 0.7, "rationale": rationale} | others


def has_numbers(context: str, rationale: str) -> bool:
    """Whether the numbers of a rationale are those of a context."""
    return ungrounded_fields(proposal(rationale=rationale), f"ABC: {context}") == ()


def has_ticker(context: str, ticker: str) -> bool:
    return ungrounded_fields(proposal(ticker), context) == ()


# Numbers


@pytest.mark.parametrize(
    ("context", "rationale"),
    [
        ("RSI 78", "RSI is at 78."),
        ("RSI 78", "RSI of 78.0 and 078."),
        ("RSI78, MA50", "RSI 78 is above MA50."),
        ("now 191.10", "191.1 is high."),
        ("now 191.1", "191.10 is high."),
        ("$244", "Now 244."),
        ("244.", "The level 244 holds."),
        ("entry=244;stop=240", "244 to 240."),
        ("AAPL190C", "The 190 strike."),
        # A sign does not matter.
        ("-5.2 %", "A loss of 5.2%."),
        ("\u22125.2 %", "A loss of -5.2%."),
        ("+8", "Up 8."),
        # Thousands.
        ("1,200 shares", "1200 shares."),
        ("1200 shares", "1,200 shares."),
        ("1,200,300.5", "1200300.50 in all."),
        ("12,00,000", "1200000 in all."),
        ("1.200 Stück", "1,200 shares."),
        ("1.200,50 Euro", "1,200.5 and no more."),
        ("1 200", "1200 shares."),
        ("1\u00a0200", "1200 shares."),
        ("1\u2009200", "1200 shares."),
        ("1\u202f200,5", "1200.5 shares."),
        ("1'200.5", "1200.5 shares."),
        ("1\u2019200", "1200 shares."),
        ("1\u02bc200", "1200 shares."),
        ("1 200 1 300", "1200, then 1300."),
        ("191,10 Euro", "191.1 is high."),
        # Lists.
        ("[182,191,244]", "182, 191 and 244."),
        ("182.40,191.10", "191.1 after 182.4."),
        ("1,2,3", "The 3, the 2, the 1."),
        ("5-8 %", "Between 5 and 8 %."),
        ("182/191", "From 182 to 191."),
        # Dates, times and fractions are the numbers that they are made of.
        ("2026-11-01", "In 2026, by 11/1."),
        ("01.11.2026", "In 2026, by 11/1."),
        ("10:30", "At 10:30."),
        ("10.30.45", "After 10, 30 and 45."),
        ("1/2", "One of 2."),
        ("\u00bd position", "1/2 of it."),
        ("3\u00bd %", "A stop at 3."),
        ("10\u2075 shares", "10 of them."),
        # What may follow a number.
        ("3.4%", "3.4 is much."),
        ("3.4", "3.4 % is much."),
        ("7 %", "A volatility of 0.07."),
        ("\u0667\u066a", "A volatility of 0.07."),
        ("0.07", "A volatility of 7 %."),
        ("7 percent", "A volatility of 0.07."),
        ("2.5k", "2500 shares."),
        ("2500", "2.5k shares."),
        ("1.2m", "1,200,000 shares."),
        ("1.5bn", "1500000000 in all."),
        ("2 million", "2000000 in all."),
        ("1e5", "100,000 in all."),
        ("2.5E+3", "2500 in all."),
        ("1e-3", "0.001 of it."),
        ("1200", "1.2e3 shares."),
        # A decimal point that comes first.
        (".5", "Up 0.5."),
        ("0.5", "Up .5."),
        ("No.5", "The 5."),
        ("182\u2026191", "182 and 191."),
        # Other scripts and widths.
        ("\u0661\u0669\u0661\u066b\u0661", "191.1 is high."),
        ("\u0661\u066c\u0662\u0660\u0660", "1200 shares."),
        ("\u0967\u0968", "12 of them."),
        ("\uff11\uff12\uff0e\uff15\uff05", "12.5% of it."),
        ("\U0001d7cf\U0001d7d0", "12 of them."),
        ("191.10\u5186", "191.1 is high."),
        ("no number", "No number either."),
    ],
)
def test_a_number_is_the_same_however_it_is_written(context: str, rationale: str) -> None:
    assert has_numbers(context, rationale)


@pytest.mark.parametrize(
    ("context", "rationale"),
    [
        ("no number", "RSI is at 78."),
        ("", "A 2."),
        ("RSI 78", "RSI is at 79."),
        ("RSI 78", "RSI is at 7."),
        ("RSI 78", "RSI is at 780."),
        ("RSI 78", "RSI is at 78.5."),
        ("RSI 78", "RSI of 78 and a gap of 3%."),
        # Neither a part nor a rounding of a number.
        ("now 191.10", "191 is high."),
        ("now 191.10", "Up 10."),
        ("now 191", "191.10 is high."),
        ("1.085", "85 of it."),
        ("12345", "1,234 shares."),
        ("1200300", "1,200 shares."),
        ("1,200,50", "1200.5 of it."),
        ("1,200 300", "1200300 in all."),
        ("1234,500", "1234500 in all."),
        ("1,20", "120 of it."),
        ("1e5.5", "100000 of it."),
        ("0.500", "500 of it."),
        # Two numbers that stand in another order, or apart.
        ("240 and 191", "191240 in all."),
        ("182, 191", "182191 in all."),
        ("10:30", "10.30 is the price."),
        ("1/4", "0.25 of it."),
        # A suffix belongs to its number and is not part of a word.
        ("5-8 %", "0.05 of it."),
        ("5 km", "5000 of it."),
        ("8 %", "0.8 of it."),
        ("1e5", "1500 of it."),
        # A letter that is equal to an i in no case but Turkish.
        ("5 m\u0131ll\u0131on", "5000000 of it."),
    ],
)
def test_a_number_that_is_made_up_is_found(context: str, rationale: str) -> None:
    assert not has_numbers(context, rationale)


@pytest.mark.parametrize(
    "numbers",
    [
        {"new_stop_pct": 2.5},
        {"new_target_pct": 2.5},
        {"confidence": 0.025},
        {"new_stop_pct": -2.5},
    ],
)
def test_the_proposals_own_numbers_ground_its_rationale(numbers: dict[str, float]) -> None:
    found = proposal(rationale="A stop of 2.5%.") | numbers
    assert ungrounded_fields(found, "ABC") == ()


def test_a_distance_of_null_grounds_nothing() -> None:
    found = proposal(rationale="A stop of 0%.", new_stop_pct=None, new_target_pct=0.5)
    assert ungrounded_fields(found, "ABC") == ("rationale",)


# Tickers


@pytest.mark.parametrize(
    ("context", "ticker"),
    [
        ("Long AAPL from 182", "AAPL"),
        ("AAPL", "AAPL"),
        ("$AAPL!", "AAPL"),
        ("AAPL.O", "AAPL"),
        ("AAPL:US", "AAPL"),
        ("(AAPL)", "AAPL"),
        ("AAPL's", "AAPL"),
        ("sym=AAPL", "AAPL"),
        ("AAPL-long", "AAPL"),
        ("AAPL_long", "AAPL"),
        ("long aapl from 182", "AAPL"),
        ("Long Aapl from 182", "AAPL"),
        ("AAPLX, then AAPL", "AAPL"),
        ("\uff21\uff21\uff30\uff2c", "AAPL"),
        ("AAPL\u3092\u8cb7\u3046", "AAPL"),
        ("\u0441\u0442\u043e\u043f \u043f\u043e AAPL", "AAPL"),
        ("BRK.B at 402", "BRK.B"),
        ("index ^GSPC", "^GSPC"),
        ("7203.T", "7203.T"),
        ("SOL/USD", "SOL/USD"),
        ("EURUSD=X", "EURUSD=X"),
        ("Long A from 130", "A"),
        ("Long F, 3 %", "F"),
        ("Long IT", "IT"),
    ],
)
def test_a_ticker_is_a_word_of_its_context(context: str, ticker: str) -> None:
    assert has_ticker(context, ticker)


@pytest.mark.parametrize(
    ("context", "ticker"),
    [
        ("", "AAPL"),
        ("Long MSFT from 402", "AAPL"),
        ("AAPLX", "AAPL"),
        ("XAAPL", "AAPL"),
        ("AAPL2", "AAPL"),
        ("2AAPL", "AAPL"),
        ("\u00e9AAPL", "AAPL"),
        ("AAPL\u0436", "AAPL"),
        ("Long AAPL", "A"),
        ("A long position", "LO"),
        ("Is a stock like it", "A"),
        ("Is a stock like it", "IT"),
        ("GSPC", "^GSPC"),
        ("BRKxB", "BRK.B"),
        ("BRK", "BRK.B"),
    ],
)
def test_another_word_is_no_ticker(context: str, ticker: str) -> None:
    assert not has_ticker(context, ticker)


# What is said of it


@pytest.mark.parametrize(
    ("ticker", "rationale", "said"),
    [
        ("ABC", "RSI of 78.", "true"),
        ("XYZ", "RSI of 78.", "ticker"),
        ("ABC", "RSI of 77.", "rationale"),
        ("XYZ", "RSI of 77.", "ticker,rationale"),
    ],
)
def test_the_fields_that_are_ungrounded_are_named(ticker: str, rationale: str, said: str) -> None:
    found = ungrounded_fields(proposal(ticker, rationale), "ABC, RSI 78")
    assert grounding.describe(found) == said


# What a context has to offer


@pytest.mark.parametrize(
    ("context", "numbers"),
    [
        ("Long AAPL from 182.40, now 191.10, RSI 78", ["182.40", "191.10", "78"]),
        ("78, 78 and 78.0", ["78", "78.0"]),
        ("1,200.50 and 10.30.45", ["1", "200.50", "10", "30", "45"]),
        ("up .5 or -3", ["0.5", "3"]),
        ("\u0661\u0662%", ["12"]),
        ("1234567890123 and 123456789012", ["123456789012"]),
        ("none", []),
    ],
)
def test_the_numbers_of_a_context(context: str, numbers: list[str]) -> None:
    assert numbers_in(context, MOST) == numbers


@pytest.mark.parametrize(
    ("context", "tickers"),
    [
        ("Long AAPL from 182.40, RSI 78", ["AAPL", "RSI"]),
        ("sym=NG=F side=LONG", ["NG=F", "LONG"]),
        ("BRK.B, BTC-USD and ^GSPC, BRK.B", ["BRK.B", "BTC-USD", "^GSPC"]),
        ("AAPL-long", ["AAPL"]),
        ("LONG/AAPL/MSFT", ["LONG", "AAPL", "MSFT"]),
        ("I long aapl, a lot", ["I", "LONG", "AAPL", "LOT"]),
        ("W short from 58", ["W"]),
        ("long aapl at 182", ["LONG", "AAPL"]),
        ("btc-usd es=f", ["BTC-USD", "BTC", "USD", "ES=F"]),
        ("7203 \u30c8\u30e8\u30bf 182 2026-11-01", ["7203"]),
        ("AAPLAAPLAAPL AAPLAAPLAAPLX", ["AAPLAAPLAAPL"]),
        ("\u00e9ABC", []),
        ("182.40 \u5186", []),
        ("", []),
    ],
)
def test_the_tickers_of_a_context(context: str, tickers: list[str]) -> None:
    assert tickers_in(context, MOST) == tickers


def test_a_context_offers_no_more_than_it_is_asked_for() -> None:
    context = " ".join(f"A{number}" for number in range(1000))
    assert tickers_in(context, 3) == ["A0", "A1", "A2"]
    assert numbers_in(context, 3) == ["0", "1", "2"]
    assert numbers_in("0,1,2,3", 3) == ["0", "1", "2"]
    assert tickers_in(context.lower(), 3) == ["A10", "A11", "A12"]


def contexts() -> Iterator[str]:
    rng = random.Random(3)
    pieces = [
        "1", "23", "456", "0", "7.5", "191.10", "1,200", ".5", "e", "E+", "%", " %", "k", "m",
        ",", ".", " ", "'", "-", "/", ":", "x", "AB", "abc", "^", "=", "\n", "\u0663", "\uff15",
        "\u00bd", "\u4fa1", "\u00e9", "$",
    ]  # fmt: skip
    while True:
        yield "".join(rng.choices(pieces, k=rng.randrange(1, 40)))


def test_every_text_under_the_guidance_of_a_context_is_grounded() -> None:
    rng = random.Random(4)
    letters = [*"abeEkKm%,;:$()/+' -", "e+", "e-", " %", "percent"]
    for _, context in zip(range(3000), contexts(), strict=False):
        numbers, tickers = numbers_in(context, MOST), tickers_in(context, MOST)
        text = "A"
        for _ in range(rng.randrange(12)):
            text += rng.choice(numbers) if numbers else ""
            text += "".join(rng.choices(letters, k=rng.randrange(1, 3)))
        ticker = rng.choice(tickers) if tickers else "NONE"
        missing = ungrounded_fields(proposal(ticker, f"{text}."), context)
        assert missing == (() if tickers else ("ticker",)), (context, text)


# To the letter


def test_a_word_that_is_part_of_another_hides_none_after_it() -> None:
    assert tickers_in("ñX ABC", MOST) == ["ABC"]


def test_what_is_as_long_as_a_ticker_may_be_is_one() -> None:
    assert tickers_in("AAAAAA-BBBBB", MOST) == ["AAAAAA-BBBBB"]
    assert tickers_in("ABCDEFGHIJKL-long now", MOST) == ["ABCDEFGHIJKL"]
    assert tickers_in("ABCDEFGHIJKLM-long XY", MOST) == ["XY"]


def test_a_group_of_thousands_has_two_or_three_digits() -> None:
    assert has_numbers("12,00,000", "1200000 in all.")
    assert not has_numbers("1,2000,000", "12000000 in all.")


def test_a_number_has_at_most_five_groups() -> None:
    assert has_numbers("1,234,567,891,234", "1234567891234 in all.")
    assert not has_numbers("1,234,567,891,234,567", "1234567891234567 in all.")


def test_long_numbers_are_exact() -> None:
    digits = "1234567890123456789012345678901"
    assert has_numbers(f"{digits}k", f"{digits}000.")
    assert has_numbers(f"{digits}e3", f"{digits}000.")
    assert not has_numbers(f"{digits}k", f"{digits[:-1]}2000.")


def test_an_exponent_has_up_to_three_digits_and_its_own_mark() -> None:
    assert has_numbers("1e100", f"1{'0' * 100}.")
    assert not has_numbers("1e1000", f"1{'0' * 1000}.")
    assert not has_numbers("5 12", "5000000000000.")
    assert not has_numbers("5,12", "5000000000000.")
