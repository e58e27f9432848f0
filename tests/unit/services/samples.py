"""A request, and the answers of the fake models."""

from __future__ import annotations

from typing import Any

from llm_sidecar import proposals
from llm_sidecar.settings import Settings
from tests.unit.fakes import FakeSidecar, completion, scores

PROMPT = "Long ABC from 100, now 112.5."
PROPOSAL: dict[str, Any] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 1.5,
    "new_target_pct": None,
    "confidence": 0.7,
    "rationale": "The trend is intact.",
}
WRITTEN = completion(proposals.dumps(PROPOSAL), adapter="20260102", completion_tokens=40)
CRITIQUE = completion("The target is thin.", model="hermes/fake")
SEED = 1234567
"""The seed of every request with a temperature."""
SURE = scores(_0=0.25, _10=0.75)
"""The probabilities of the score 0.75."""
UNGROUNDED = completion(proposals.dumps(PROPOSAL | {"ticker": "NEW", "rationale": "RSI is at 78."}))
"""A proposal whose ticker and rationale are not grounded in the prompt."""


def fake_sidecar(**settings: Any) -> FakeSidecar:
    """A sidecar whose models have one proposal, one critique and one score to give."""
    made = FakeSidecar(Settings(events={"url": "memory://"}, **settings))
    made.phi3.answers = [WRITTEN]
    made.hermes.answers = [CRITIQUE, SURE]
    return made


def without(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    """The row without these columns."""
    return {name: value for name, value in row.items() if name not in columns}
