"""The situations a synthetic prompt can describe, and the rule that turns each into an answer.

The rule, which `answer` applies:

1. A situation pushes the price up (`direction` 1), down (-1) or neither (0). That helps a position
   on one side of the market and hurts one on the other; an unknown side has a rule of its own.
2. The situation and that relation give action, stop, target (percent distances) and confidence.
3. A stated average true range below 1.5 % halves stop and target, one of 3 % or more makes them
   half as large again.
4. The rationale names the situation, with the number that the prompt states for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Side = Literal["LONG", "SHORT"]
Relation = Literal["helps", "hurts", "unknown"]

CALM_ATR: Final = 1.5
WILD_ATR: Final = 3.0


@dataclass(frozen=True, slots=True)
class Rule:
    """The answer in one situation: action, confidence, stop and target in percent, wording."""

    action: Literal["adjust", "pass", "abort"]
    advice: str
    confidence: float
    stop: float | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """One situation.

    Attributes:
        keyword: contained in every rationale about it.
        direction: 1, -1 or 0, where it pushes the price.
        number: lowest, highest and decimals of the number that a prompt may state for it.
        named: first half of the rationale without a number.
        measured: the same with a number, written `<n>`.
        rules: by relation to the side.
    """

    keyword: str
    direction: int
    number: tuple[float, float, int]
    named: str
    measured: str
    rules: Mapping[Relation, Rule]


def _same(rule: Rule) -> Mapping[Relation, Rule]:
    return {"helps": rule, "hurts": rule, "unknown": rule}


_TIGHTEN, _TRAIL, _SMALL = "so tighten the stop", "so trail the stop", "so keep the risk small"
_RUN, _CLOSE, _WIDEN = "so let it run", "so close the trade", "so give it more room"
_WITH: Final = Rule("pass", _RUN, 0.66)

SITUATIONS: Final[Mapping[str, Situation]] = {
    "overbought": Situation(
        "overbought",
        -1,
        (70, 92, 1),
        "The price is overbought",
        "RSI of <n> is overbought",
        {
            "hurts": Rule("adjust", _TIGHTEN, 0.72, 1.4, 2.0),
            "helps": _WITH,
            "unknown": Rule("adjust", _SMALL, 0.55, 2.0, 3.0),
        },
    ),
    "oversold": Situation(
        "oversold",
        1,
        (8, 30, 1),
        "The price is oversold",
        "RSI of <n> is oversold",
        {
            "hurts": Rule("adjust", _TIGHTEN, 0.71, 1.6, 2.2),
            "helps": _WITH,
            "unknown": Rule("adjust", _SMALL, 0.54, 2.0, 3.0),
        },
    ),
    "broke_support": Situation(
        "support",
        -1,
        (5, 900, 2),
        "The price broke support",
        "The break of support at <n> counts",
        {
            "hurts": Rule("abort", _CLOSE, 0.82),
            "helps": Rule("adjust", _TRAIL, 0.78, 2.4, 6.0),
            "unknown": Rule("adjust", _SMALL, 0.5, 2.0, 4.0),
        },
    ),
    "breakout": Situation(
        "resistance",
        1,
        (5, 900, 2),
        "The price broke resistance",
        "The break of resistance at <n> counts",
        {
            "hurts": Rule("abort", _CLOSE, 0.81),
            "helps": Rule("adjust", _TRAIL, 0.77, 2.2, 6.4),
            "unknown": Rule("adjust", _SMALL, 0.51, 2.0, 4.0),
        },
    ),
    "bad_news": Situation(
        "bad news",
        -1,
        (2, 30, 1),
        "Bad news hit the price",
        "Bad news moved it by <n>%",
        {
            "hurts": Rule("abort", _CLOSE, 0.84),
            "helps": Rule("adjust", _TRAIL, 0.75, 3.0, 8.0),
            "unknown": Rule("abort", "so stand aside", 0.6),
        },
    ),
    "good_news": Situation(
        "good news",
        1,
        (2, 30, 1),
        "Good news lifted the price",
        "Good news moved it by <n>%",
        {
            "hurts": Rule("abort", _CLOSE, 0.83),
            "helps": Rule("adjust", _TRAIL, 0.76, 3.2, 8.4),
            "unknown": Rule("abort", "so stand aside", 0.59),
        },
    ),
    "near_stop": Situation(
        "stop is close",
        0,
        (0.1, 0.9, 1),
        "The stop is close",
        "The stop is close, <n>% away",
        _same(Rule("pass", "so let it do its work", 0.61)),
    ),
    "near_target": Situation(
        "target is close",
        0,
        (0.1, 0.9, 1),
        "The target is close",
        "The target is close, <n>% away",
        _same(Rule("adjust", "so lock in the gain", 0.79, 0.8, 1.2)),
    ),
    "earnings": Situation(
        "earnings",
        0,
        (1, 9, 0),
        "Upcoming earnings may gap the price",
        "With earnings <n> days ahead it may gap",
        _same(Rule("adjust", _WIDEN, 0.58, 4.0, 6.0)),
    ),
    "macro": Situation(
        "macro event",
        0,
        (1, 48, 0),
        "A macro event is near",
        "A macro event is <n> hours away",
        _same(Rule("adjust", _WIDEN, 0.56, 3.0, 4.4)),
    ),
    "trend": Situation(
        "trend",
        0,
        (20, 50, 0),
        "The trend is intact",
        "The trend is intact with ADX at <n>",
        _same(Rule("pass", _RUN, 0.74)),
    ),
    "low_volume": Situation(
        "volume",
        0,
        (20, 80, 0),
        "The volume is drying up",
        "The volume is <n>% below average",
        _same(Rule("adjust", _TIGHTEN, 0.62, 1.2, 2.4)),
    ),
    "thesis_broken": Situation(
        "thesis",
        0,
        (1, 9, 0),
        "The thesis is broken",
        "The thesis is broken",
        _same(Rule("abort", _CLOSE, 0.88)),
    ),
    "volatility": Situation(
        "volatility",
        0,
        (30, 160, 0),
        "The volatility is rising",
        "The volatility is up by <n>%",
        _same(Rule("adjust", _WIDEN, 0.63, 3.6, 7.0)),
    ),
    "quiet": Situation(
        "quiet",
        0,
        (1, 9, 0),
        "The market is quiet",
        "The market is quiet",
        _same(Rule("pass", "so leave it as it is", 0.52)),
    ),
    "gap": Situation(
        "gap",
        0,
        (2, 15, 1),
        "The overnight gap adds risk",
        "The gap of <n>% adds risk",
        _same(Rule("adjust", "so reset the levels", 0.64, 2.6, 5.0)),
    ),
    "illiquid": Situation(
        "liquidity",
        0,
        (40, 300, 0),
        "The liquidity is poor",
        "The liquidity is poor with a spread of <n>bp",
        _same(Rule("abort", "so get out with limit orders", 0.57)),
    ),
    "winner": Situation(
        "profit",
        0,
        (6, 40, 1),
        "The trade is well in profit",
        "The trade is <n>% in profit",
        _same(Rule("adjust", _TRAIL, 0.8, 2.8, 9.0)),
    ),
    "loser": Situation(
        "loss",
        0,
        (4, 20, 1),
        "The trade runs at a loss",
        "The trade runs at a loss of <n>%",
        _same(Rule("adjust", "so cut the risk", 0.53, 1.0, 3.2)),
    ),
    "stale": Situation(
        "nowhere",
        0,
        (10, 60, 0),
        "The trade went nowhere",
        "The trade went nowhere in <n> days",
        _same(Rule("abort", "so free the capital", 0.65)),
    ),
}


def relation(situation: Situation, side: Side | None) -> Relation:
    """Whether the situation helps a position on `side`; one without direction helps both."""
    if side is None:
        return "unknown"
    return "helps" if situation.direction * (1 if side == "LONG" else -1) >= 0 else "hurts"


def answer(
    name: str, ticker: str, side: Side | None, number: str | None, atr: str | None
) -> dict[str, Any]:
    """The proposal that the module's rule gives.

    Args:
        name: key of `SITUATIONS`.
        ticker: copied into the proposal.
        side: None where the prompt states none; the proposal then has none either.
        number: the situation's number as the prompt states it, or None.
        atr: average true range in percent as the prompt states it, or None.
    """
    situation = SITUATIONS[name]
    rule = situation.rules[relation(situation, side)]
    scale = 1.0
    if atr is not None:
        scale = 0.5 if float(atr) < CALM_ATR else 1.5 if float(atr) >= WILD_ATR else 1.0
    cause = situation.named if number is None else situation.measured.replace("<n>", number)
    return {
        "ticker": ticker,
        "action": rule.action,
        **({} if side is None else {"side": side}),
        "new_stop_pct": None if rule.stop is None else round(rule.stop * scale, 2),
        "new_target_pct": None if rule.target is None else round(rule.target * scale, 2),
        "confidence": rule.confidence,
        "rationale": f"{cause}, {rule.advice}.",
    }
