"""Requests and answers that the tests of remote models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.errors import SidecarError
from llm_sidecar.models.base import GenerationRequest, Message, ServerStatus
from llm_sidecar.models.remote.breaker import CircuitBreaker
from llm_sidecar.models.remote.model import RemoteModel
from tests.unit.remote.openai_server import (
    chunk,
    events,
    usage,
)

CHAT: list[Message] = [{"role": "user", "content": "Hold ABC?"}]
ASK = GenerationRequest(CHAT, 40)
PROPOSE = GenerationRequest(proposals.build_messages("Long ABC."), 248, proposals.GUIDANCE, 0.5, 7)
SCORE = hermes_plugin.score_messages({"ticker": "ABC"})
FINE = events(chunk("Fi"), chunk("ne."), chunk("", "stop"), usage(11, 3))
PROPOSAL = {
    "ticker": "ABC",
    "action": "pass",
    "new_stop_pct": 2.5,
    "new_target_pct": None,
    "confidence": 0.5,
    "rationale": "It holds for now.",
}

Make = Callable[..., RemoteModel]
"""The fixture `make`."""


def server_of(model: RemoteModel) -> ServerStatus:
    (status,) = model.status().servers
    return status


def answer(status: int, body: Any = None, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers=names)


def no_rest(breaker: CircuitBreaker, seconds: float, error: SidecarError) -> None:
    """Replaces `CircuitBreaker._rest`: ends each rest at once."""
    breaker._error = error
