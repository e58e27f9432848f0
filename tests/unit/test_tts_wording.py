"""How numbers, prices, tickers and abbreviations are written out before they are spoken."""

from __future__ import annotations

import time

import pytest

from llm_sidecar.tts.wording import spoken
from llm_sidecar.tts.wording.numbers import cardinal, ordinal, two_digits, year

WORDINGS = {
    # numbers
    "0": "zero",
    "7": "seven",
    "13": "thirteen",
    "40": "forty",
    "78": "seventy-eight",
    "412": "four hundred twelve",
    "900": "nine hundred",
    "1000": "one thousand",
    "10,005": "ten thousand five",
    "1,250,000": "one million two hundred fifty thousand",
    "182.40": "one hundred eighty-two point four zero",
    "1.0845": "one point zero eight four five",
    "it is .5 now": "it is point five now",
    "007": "zero zero seven",
    "1,2,3": "one, two, three",
    "0.1.0": "zero point one point zero",
    "1.234,56": "one point two three four, fifty-six",
    "123456789012345": "one hundred twenty-three trillion four hundred fifty-six billion seven"
    " hundred eighty-nine million twelve thousand three hundred forty-five",
    "1234567890123456": "one two three four five six seven eight nine zero one two three four five"
    " six",
    "Sell 5.": "Sell five.",
    "1. Buy now.": "one. Buy now.",
    "1st 2nd 3rd 4th 12th 20th 21st 25th": "first second third fourth twelfth twentieth"
    " twenty-first twenty-fifth",
    # percent and other units
    "2.5%": "two point five percent",
    "2.5 %": "two point five percent",
    "1%": "one percent",
    "5‰": "five per mille",
    "25bps": "twenty-five basis points",
    "25 bps": "twenty-five basis points",
    "1bp": "one basis point",
    "1.5x": "one point five times",
    "2X": "two times",
    "50¢": "fifty cents",
    "10k": "ten thousand",
    "2.5M": "two point five million",
    "3bn": "three billion",
    "1.2tn": "one point two trillion",
    "a 5m chart": "a five m chart",
    # signs
    "+3.2%": "plus three point two percent",
    "-1%": "minus one percent",
    "\N{MINUS SIGN}1%": "minus one percent",
    "±2%": "plus or minus two percent",
    "~5%": "about five percent",
    "≈ 5%": "about five percent",
    "(-5%)": "(minus five percent)",
    "F-16": "F-sixteen",
    "up 5%-ish": "up five percent-ish",
    "RSI > 70": "R S I above seventy",
    "RSI<30": "R S I below thirty",
    "a >= $5": "a at least five dollars",
    "a ≤ -5": "a at most minus five",
    "180 → 182": "one hundred eighty to one hundred eighty-two",
    "180->182": "one hundred eighty to one hundred eighty-two",
    "#1": "number one",
    "No. 5": "number five",
    "@ 244": "at two hundred forty-four",
    # currency
    "$1,250.50": "one thousand two hundred fifty dollars and fifty cents",
    "$182.40": "one hundred eighty-two dollars and forty cents",
    "$1": "one dollar",
    "$1.00": "one dollar",
    "$1.01": "one dollar and one cent",
    "$0.05": "five cents",
    "$.05": "five cents",
    "$0.01": "one cent",
    "$0.00": "zero dollars",
    "$1.5": "one point five dollars",
    "$182.405": "one hundred eighty-two point four zero five dollars",
    "$5M": "five million dollars",
    "$5m": "five million dollars",
    "$1M": "one million dollars",
    "$2.5 million": "two point five million dollars",
    "€3bn": "three billion euros",
    "€1": "one euro",
    "£1.01": "one pound and one penny",
    "£2.50": "two pounds and fifty pence",
    "¥100.50": "one hundred point five zero yen",
    "US$5": "five U S dollars",
    "HK$5": "five Hong Kong dollars",
    "C$5.25": "five Canadian dollars and twenty-five cents",
    "-$5": "minus five dollars",
    "$-5": "minus five dollars",
    "5 USD": "five U S D",
    # ranges
    "3-5%": "three to five percent",
    "3–5": "three to five",
    "180 – 185": "one hundred eighty to one hundred eighty-five",
    "$180-185": "one hundred eighty to one hundred eighty-five dollars",
    "$180-$185": "one hundred eighty to one hundred eighty-five dollars",
    "$5-10M": "five to ten million dollars",
    "2%-3%": "two percent to three percent",
    "25-50bps": "twenty-five to fifty basis points",
    "~3-5%": "about three to five percent",
    "555-123-4567": "five five five dash one two three dash four five six seven",
    # dates, times, ratios
    "2026-11-25": "November twenty-fifth twenty twenty-six",
    "2026-11-25T14:30:00Z": "November twenty-fifth twenty twenty-six fourteen thirty Z",
    "2026-13-25": "two zero two six dash one three dash two five",
    "11/25/2026": "November twenty-fifth twenty twenty-six",
    "25/11/2026": "November twenty-fifth twenty twenty-six",
    "Nov 25": "November twenty-fifth",
    "Nov. 25, 2005": "November twenty-fifth, two thousand five",
    "March 3rd": "March third",
    "May 5%": "May five percent",
    "Mar 99": "Mar ninety-nine",
    "14:30": "fourteen thirty",
    "9:05": "nine oh five",
    "9:00": "nine o'clock",
    "16:00": "sixteen hundred",
    "14:30:05": "fourteen thirty and five seconds",
    "9:30am ET": "nine thirty A M E T",
    "4pm.": "four P M.",
    "4 p.m. today": "four P M today",
    "at 4 p.m.": "at four P M.",
    "3:1": "three to one",
    "2.5:1": "two point five to one",
    "Q3": "Q three",
    # tickers and other capitals
    "AAPL": "A A P L",
    "$TSLA": "T S L A",
    "$LONG": "L O N G",
    "$F": "F",
    "BRK.B": "B R K dot B",
    "ES=F": "E S equals F",
    "BTC-USD": "B T C U S D",
    "EUR/USD": "E U R U S D",
    "P/E": "P E",
    "S&P 500": "S and P five hundred",
    "AT&T": "A T and T",
    "AAPL's": "A A P L's",
    "AAPL’s": "A A P L’s",
    "ETFs": "E T F's",
    "RSI 78": "R S I seventy-eight",
    "RSI14": "R S I fourteen",
    "ATR, EPS": "A T R, E P S",
    "5G": "five G",
    "0DTE": "zero D T E",
    "LONG": "long",
    "SHORT": "short",
    "SELL NOW": "sell now",
    "LONG/SHORT": "long short",
    "NASDAQ": "nasdaq",
    "VIX": "vix",
    "VWAP": "V wap",
    "the U.S. market": "the U S market",
    "in the U.S.": "in the U S.",
    "J. P. Morgan": "J. P. Morgan",
    "DON'T": "DON'T",
    "A and I": "A and I",
    # abbreviations and names of fields
    "AAPL vs. MSFT": "A A P L versus M S F T",
    "up vs MSFT": "up versus M S F T",
    "approx. 5%": "approximately five percent",
    "e.g. gold": "for example gold",
    "gold etc.": "gold et cetera.",
    "new_stop_pct is 1.4": "new stop percent is one point four",
    "5 pct.": "five percent.",
    "5pct": "five percent",
    # what stays
    "": "",
    "The stop moves up; take the profit.": "The stop moves up; take the profit.",
    "% & €": "% & €",
    "me@x.com": "me@x.com",
    "Grüße, 価格!": "Grüße, 価格!",
    "\N{VULGAR FRACTION ONE HALF}": "\N{VULGAR FRACTION ONE HALF}",
    "\N{ARABIC-INDIC DIGIT FIVE}": "\N{ARABIC-INDIC DIGIT FIVE}",
}


@pytest.mark.parametrize(("written", "said"), WORDINGS.items(), ids=WORDINGS)
def test_a_text_is_written_out_as_a_trader_says_it(written: str, said: str) -> None:
    assert spoken(written) == said


@pytest.mark.parametrize("said", WORDINGS.values(), ids=WORDINGS)
def test_what_is_written_out_stays_so(said: str) -> None:
    assert spoken(said) == said


def test_a_whole_sentence() -> None:
    text = "Short TSLA @ 244, broke support at 240.50, ATR 3.4%; risk $1,250.50 at 1.5x."
    assert spoken(text) == (
        "Short T S L A at two hundred forty-four, broke support at two hundred forty point five"
        " zero, A T R three point four percent; risk one thousand two hundred fifty dollars and"
        " fifty cents at one point five times."
    )


HARD = (
    *("7", "1,", "1-", "1:", "1.", "1.1", "$", "-", "±1% ", "~ ", " ", "> ", ">=1 ", "a_", "A&"),
    *("A.", "A.B", "A's", "BRK.B ", "Nov 1, ", "1/1/2026 ", "1:1:", "HK$5 ", "€1 ", "1% "),
)


@pytest.mark.parametrize("piece", HARD)
def test_the_length_is_bounded_and_the_time_is_linear(piece: str) -> None:
    text = piece * (10_000 // len(piece))
    began = time.process_time()
    assert len(spoken(text)) <= 16 * len(text)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("2026", "twenty twenty-six"),
        ("2005", "two thousand five"),
        ("1900", "nineteen hundred"),
        ("1907", "nineteen oh seven"),
        ("0026", "zero zero two six"),
    ],
)
def test_a_year_is_read_in_pairs(digits: str, words: str) -> None:
    assert year(digits) == words


def test_numbers_as_words() -> None:
    assert cardinal("20100000000") == "twenty billion one hundred million"
    assert ordinal("30") == "thirtieth"
    assert ordinal("109") == "one hundred ninth"
    assert (two_digits("00"), two_digits("10")) == ("oh zero", "ten")
