"""Chats like those that the sidecar sends, to compare two models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from llm_sidecar.engines import Message

_OFFICER: Final = Message(
    role="system",
    content="You are the risk officer of a trading desk. You judge trade proposals by their reward "
    "to risk, their stop and whether the rationale follows from the market context.",
)
_REVIEWER: Final = Message(
    role="system",
    content="You review open trades. Answer with one JSON object: ticker; action adjust, pass or "
    "abort; side LONG or SHORT; new_stop_pct and new_target_pct in percent, or null; confidence "
    "from 0 to 1; rationale, one short sentence.",
)
_CONTEXT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."
_PROPOSAL: Final = (
    '{"ticker":"AAPL","action":"adjust","side":"LONG","new_stop_pct":2.5,"new_target_pct":6.0,'
    '"confidence":0.7,"rationale":"RSI of 78 is overbought, so tighten the stop."}'
)


def _user(content: str) -> Message:
    return Message(role="user", content=content)


SAMPLE_CHATS: Final[Sequence[Sequence[Message]]] = (
    [_OFFICER, _user("What does a trailing stop do?")],
    [_OFFICER, _user(f"{_CONTEXT}\n\n{_PROPOSAL}\n\nCriticise this in at most three sentences.")],
    [_OFFICER, _user(f"{_CONTEXT}\n\n{_PROPOSAL}\n\nScore it from 0 to 10, a number only.")],
    [_OFFICER, _user(f"{_PROPOSAL}\n\nScore it from 0 to 10, a number only.")],
    [_REVIEWER, _user(_CONTEXT)],
    [
        _REVIEWER,
        _user(_CONTEXT),
        Message(role="assistant", content=_PROPOSAL),
        _user("Short TSLA, lost support at 212, ATR 4.1%."),
    ],
)

SCORE_ANSWERS: Final = tuple(str(number) for number in range(11))

_CASES: Final = (
    ("Long AAPL from 182.40, now 191.10, RSI 78.", "AAPL", "adjust", 2.5, 6.0, "RSI of 78."),
    ("Long AAPL from 182.40, now 191.10, RSI 78.", "AAPL", "adjust", 25.0, 0.5, "It will rise."),
    ("Short TSLA, lost support at 212, ATR 4.1%.", "TSLA", "adjust", 4.5, 9.0, "Support is lost."),
    ("Short TSLA, lost support at 212, ATR 4.1%.", "TSLA", "pass", None, None, "Nothing happened."),
    (
        "Long MSFT, thesis broken: guidance cut by 20%.",
        "MSFT",
        "abort",
        None,
        None,
        "Guidance cut.",
    ),
    ("Long MSFT, thesis broken: guidance cut by 20%.", "MSFT", "adjust", 15.0, 2.0, "Add more."),
    ("Long XOM, oil up 3%, stop far below the range.", "XOM", "adjust", 3.0, 7.5, "Oil is up."),
    ("Long XOM, oil up 3%, stop far below the range.", "CVX", "abort", None, None, "I like gold."),
    ("Short NVDA into earnings tomorrow, up 2%.", "NVDA", "abort", None, None, "Event risk."),
    ("Short NVDA into earnings tomorrow, up 2%.", "NVDA", "adjust", 40.0, 1.0, "Hold on."),
    ("Long JPM, flat for a month, volume dries up.", "JPM", "pass", None, None, "No new facts."),
    ("Long JPM, flat for a month, volume dries up.", "JPM", "adjust", 0.1, 50.0, "Moon soon."),
    ("Long gold future, yields fell 11 basis points.", "GC", "adjust", 2.0, 5.0, "Lower yields."),
    ("Long gold future, yields fell 11 basis points.", "GC", "abort", None, None, "Yields rose."),
    ("Short EURUSD, central bank raised by surprise.", "EURUSD", "abort", None, None, "A rise."),
    (
        "Short EURUSD, central bank raised by surprise.",
        "EURUSD",
        "pass",
        None,
        None,
        "All is well.",
    ),
    ("Long AMZN, +14% since entry, trend intact.", "AMZN", "adjust", 5.0, 10.0, "Trail the stop."),
    ("Long AMZN, +14% since entry, trend intact.", "AMZN", "adjust", 0.2, 0.2, "Bored."),
    ("Long airline, rumour of a bid at +30%.", "LUV", "adjust", 6.0, 25.0, "The bid caps it."),
    ("Long airline, rumour of a bid at +30%.", "LUV", "adjust", 90.0, 90.0, "Why not?"),
)
"""Market context, ticker, action, stop, target and rationale: good proposals and bad ones."""


def _score_chat(
    context: str, ticker: str, action: str, stop: float | None, target: float | None, why: str
) -> Sequence[Message]:
    proposal = {
        "ticker": ticker,
        "action": action,
        "new_stop_pct": stop,
        "new_target_pct": target,
        "confidence": 0.7,
        "rationale": why,
    }
    written = json.dumps(proposal, separators=(",", ":"))
    task = "Score it from 0 to 10, a number only."
    asked = f"Market context:\n{context}\n\nProposal:\n{written}\n\n{task}"
    return [_OFFICER, _user(asked), Message(role="assistant", content='{"score":')]


SCORE_CHATS: Final[Sequence[Sequence[Message]]] = tuple(_score_chat(*case) for case in _CASES)
"""Twenty proposals to score."""
