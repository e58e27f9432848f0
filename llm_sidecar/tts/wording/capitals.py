"""Words in capitals: tickers and abbreviations are spelled, others are read as words."""

from __future__ import annotations

import re
from typing import Final

from llm_sidecar.tts.wording.rule import Rule, final_dot

_AS_WORDS: Final = frozenset(
    (
        "abort about above add after again alert all also an and any are as ask at back bad"
        " bear below best bid big bond book both break bull but buy buys by call calls can cap"
        " cash clear close cold cover cut cuts data day days deal deals debt do does done down"
        " draw early edge end entry even ever exit exits fade fail fall falls false fast fed"
        " few fill fills final firm first flat flow for free from full fund funds gain gains"
        " gap gaps get go going gold good grow half halt has have hedge high highs hit hits"
        " hold holds hot how if in index into is it its jump just keep key large last late"
        " lead less level like limit line loan long longs loss lot lots low lower lows main"
        " make many may mean mid more most move moves must near new news next no none nor not"
        " note now null of off oil ok old on once one only open or order our out over own part"
        " pass pay peak per plan play plus point pool price pump push put puts quick quit"
        " raise range rate rates reach read real reset rise rises risk rule run same say says"
        " see sell sells set share short shows side sign size slow small so sold some soon"
        " spike spot stay step still stock stop stops such swap swing take taken tax test than"
        " that the their them then there these they this time times to today too top trade"
        " trend trim true try turn two under unit until up upon use usual value very wait was"
        " watch way weak week well were what when which while will win wins with worst would"
        " yen yes yet yield you your zero"
    ).split()
)
"""Words of up to five letters that a text may write in capitals; others are spelled."""
_ACRONYMS: Final = {
    "CAC": "cack",
    "DAX": "dax",
    "FTSE": "footsie",
    "GAAP": "gap",
    "LIBOR": "lye bore",
    "MACD": "mac D",
    "NATO": "nato",
    "NYMEX": "nymex",
    "COMEX": "comex",
    "COVID": "covid",
    "OPEC": "opec",
    "REIT": "reet",
    "SOFR": "sofer",
    "SPAC": "spack",
    "TIPS": "tips",
    "VIX": "vix",
    "VWAP": "V wap",
}
_LONGEST_TICKER: Final = 5
_INITIALS: Final = re.compile(r"(?<!\w)[A-Z](?:\.[A-Z])+(?:\.(?!\w)|(?![\w.]))")
_CAPITALS: Final = re.compile(
    r"(?<![\w.])\$?[A-Z]+(?:[.&/=-][A-Z]+)*(?:['’]?s)?(?![\w$]|['’][A-Za-z]|[.&/=-][A-Z])"
)
_CONNECTORS: Final = {".": " dot ", "&": " and ", "/": " ", "=": " equals ", "-": " "}


def _initials(match: re.Match[str]) -> str:
    letters = match[0].replace(".", " ").rstrip()
    return letters + (final_dot(match) if match[0].endswith(".") else "")


def _capitals(match: re.Match[str]) -> str:
    """A word in capitals: spelled, unless it is pronounced."""
    word = match[0].removeprefix("$")
    letters = word.rstrip("s’'")
    plural = word[len(letters) :]
    pieces = re.split(r"([.&/=-])", letters)
    if pieces == [letters] and len(letters) == 1 and not plural:
        return word
    is_tag = match[0].startswith("$")
    is_name = is_tag or bool({".", "&", "="}.intersection(pieces))
    said = [_CONNECTORS.get(piece) or _capital_word(piece, is_name) for piece in pieces]
    if plural == "s" and " " in said[-1]:
        plural = "'s"  # else a lone "s" would be spelled
    return "".join(said) + plural


def _capital_word(word: str, is_name: bool) -> str:
    if not is_name:
        if acronym := _ACRONYMS.get(word):
            return acronym
        if len(word) > _LONGEST_TICKER or (len(word) > 1 and word.lower() in _AS_WORDS):
            return word.lower()
    return " ".join(word)


RULES: Final[tuple[Rule, ...]] = ((_INITIALS, _initials), (_CAPITALS, _capitals))
