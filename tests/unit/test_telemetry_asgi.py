"""What telemetry reads from an ASGI request."""

from __future__ import annotations

import pytest
from starlette.types import Message

from llm_sidecar.telemetry.asgi import TrackedSend, is_observed, known_method
from tests.unit.asgi import Call, http_scope


async def test_a_response_has_started_once_its_start_is_sent() -> None:
    call = Call()
    response = TrackedSend(call.send)
    assert (response.status, response.started) == (None, False)
    messages: list[Message] = [
        {"type": "http.response.start", "status": 206, "headers": []},
        {"type": "http.response.body", "body": b"x"},
    ]
    for message in messages:
        await response(message)
        assert (response.status, response.started) == (206, True)
    assert call.sent == messages


@pytest.mark.parametrize(
    ("path", "observed"),
    [
        ("/health", False),
        ("/health/live/", False),
        ("/metrics", False),
        ("/debug/prof", False),
        ("/generate/", True),
        ("/healthy", True),
    ],
)
def test_probes_metrics_and_profiles_are_not_observed(path: str, observed: bool) -> None:
    assert is_observed(http_scope(path)) is observed


@pytest.mark.parametrize(("method", "shown"), [("GET", "GET"), ("BREW", "other"), ("get", "other")])
def test_a_method_that_is_not_standard_is_other(method: str, shown: str) -> None:
    assert known_method(method) == shown
