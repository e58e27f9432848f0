"""Example values in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final

PROMPT: Final = "Long AAPL from 182.40, now 191.10, RSI 78 after an 8 % run."
TRANSACTION_ID: Final = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
FEEDBACK_ID: Final = "9f2c1d64a7d0"
ENTRY_ID: Final = "1769853600123-0"
PROPOSAL: Final[dict[str, Any]] = {
    "ticker": "AAPL",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.5,
    "new_target_pct": 4.0,
    "confidence": 0.72,
    "rationale": "RSI at 78 calls for a tighter stop.",
}
CORRECTED: Final = PROPOSAL | {"new_stop_pct": 3.5}
