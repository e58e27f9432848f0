"""Random tickers of every usual form, split by hash into training and held-out ones."""

from __future__ import annotations

import hashlib
from random import Random
from typing import Final, Literal

Split = Literal["train", "held-out"]

_CAPITALS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONSONANTS: Final = "BCDFGHJKLMNPRSTVWXZ"
_VOWELS: Final = "AEIOUY"

ACRONYMS: Final = (
    "RSI ATR VWAP EMA SMA CPI PPI FOMC ECB FED BOJ NFP GDP PMI USD EUR CEO CFO EPS ETF PM AM EST "
    "ET UTC GMT IV HV IPO SEC FDA EU US UK USA P NL PNL PL MACD ADX OBV BB HOD LOD ATH YTD MTD "
    "QTD EOD MOC LOC GTC DMA MA TP SL BE RR ADV OI DTE ITM OTM NAV AUM AI IT EV ESG M A DCF FCF "
    "EBITDA LONG SHORT BUY SELL BOT SLD BTO STO STC BTC L S B SS STOP LMT MKT TGT QTY PX AVG POS "
    "SYM SIDE NYSE NASDAQ LSE TSX ASX XETRA CME CBOE ICE OTC ARCA BATS EDGX IEX DAY DTC HTB FX OK "
    "ASAP FYI RE PT TLDR NB Q H TTM YOY QOQ CAPEX OPEX GUIDE BPS PCT NOTE NEWS"
).split()
"""Words that a trading desk writes in capitals; never drawn as tickers."""

INDEXES: Final = (
    "SPY QQQ IWM DIA VIX SPX NDX DXY TLT XLK XLF XLE SMH RUT DAX FTSE HYG GLD"
).split()
"""Market references that a prompt mentions beside its instrument, or as its instrument."""

KEYWORDS: Final = (
    "TICKER SYMBOL INSTRUMENT INSTR INST ASSET SECURITY STOCK CODE PRODUCT CONTRACT MARKET EQUITY "
    "PAIR RIC TKR UNDERLYING DIRECTION DIR POSITION BIAS TRADE EXPOSURE BOOK HOLDING ENTRY PRICE "
    "COST OPEN HIGH LOW CLOSE BID ASK VOL VOLUME SIZE SHARES UNITS LOTS MARK MID SPOT NOW TARGET "
    "ACCT ACCOUNT DESK TRADER USER VENUE EXCH CCY PEER BENCH SIGNAL STATE EVENT SETUP FLAG TIME "
    "TS ID REF STATUS SECTOR THEME TAG TYPE ALERT INFO UPDATE LOG WARN ROW ORDER RISK REVIEW CALL "
    "CUT RAISED BREAKING WIRE EARNINGS GUIDANCE TREND RANGE FLAT NONE NULL TRUE FALSE YES NO ALL"
).split()
"""Words that forms write in capitals as keys and values; never drawn as tickers."""

_TABOO: Final = frozenset(ACRONYMS) | frozenset(KEYWORDS)
_EXCHANGE_SUFFIXES: Final = (
    ".L .DE .PA .AS .TO .V .AX .MI .SW .ST .OL .HE .CO .BR .MC .SA .NS .BO .KS .SI .OQ .N .O .K"
).split()
_CRYPTO_QUOTES: Final = ("-USD", "-USDT", "/USD", "/USDT", "USDT", "-PERP", "-EUR", "USD")
_CURRENCIES: Final = (
    "USD EUR JPY GBP CHF AUD NZD CAD NOK SEK DKK PLN HUF CZK TRY ZAR MXN SGD HKD CNH INR KRW BRL"
).split()


def split_of(ticker: str) -> Split:
    """The split of a ticker: one in ten by hash is held out, and no training prompt contains it.

    Training prompts mention all market references, so none of them is held out.
    """
    if ticker.upper() in INDEXES:
        return "train"
    digest = hashlib.sha256(ticker.upper().encode()).digest()
    return "held-out" if digest[0] % 10 == 0 else "train"


def random_ticker(rng: Random, split: Split = "train") -> str:
    """A ticker of `split`, of at most 12 characters, that is not a usual acronym or keyword."""
    while True:
        # Sometimes an index is the instrument.
        ticker = rng.choice(INDEXES) if rng.random() < 0.02 else _random_code(rng)
        if len(ticker) <= 12 and ticker not in _TABOO and split_of(ticker) == split:
            return ticker


def root_code(rng: Random) -> str:
    """One to five capitals, half of the time pronounceable; may be an acronym."""
    length = rng.choices((1, 2, 3, 4, 5), (3, 9, 30, 46, 12))[0]
    if rng.random() < 0.5:
        return "".join(rng.choice(_CAPITALS) for _ in range(length))
    start = rng.randrange(2)
    return "".join(rng.choice(_VOWELS if (i + start) % 2 else _CONSONANTS) for i in range(length))


def _random_code(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.68:
        return root_code(rng)
    if kind < 0.73:
        return root_code(rng) + rng.choice(".-/") + rng.choice("ABCKP")
    if kind < 0.78:
        return root_code(rng) + rng.choice(("", "", "1", "3", "4")) + rng.choice(_EXCHANGE_SUFFIXES)
    if kind < 0.86:
        digits = str(rng.randrange(1, 9999)).zfill(4)
        return digits + rng.choice((".T", ".HK", ".SS", ".SZ", ".KS", ".TW"))
    if kind < 0.91:
        return root_code(rng)[:5] + rng.choice(_CRYPTO_QUOTES)
    if kind < 0.95:
        base, quote = rng.sample(_CURRENCIES, 2)
        other = root_code(rng)[:3]
        base = base if rng.random() < 0.5 else other
        return base + rng.choice(("", "", "/", "-", ".")) + quote + rng.choice(("", "", "", "=X"))
    if kind < 0.97:
        return root_code(rng)[:3] + "=F"
    if kind < 0.99:
        return root_code(rng)[:3] + rng.choice("FGHJKMNQUVXZ") + str(rng.randrange(10, 30))[-2:]
    return "^" + root_code(rng)
