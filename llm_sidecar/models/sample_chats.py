"""Chats like those that the sidecar sends, to compare two models."""

from __future__ import annotations

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
