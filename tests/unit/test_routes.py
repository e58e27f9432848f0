"""The routes of scores and feedback, in this process, over a sidecar whose parts are fakes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.errors import DatabaseUnavailable, QueueFull
from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeParts

SURE = dict.fromkeys(hermes_plugin.SCORE_ANSWERS, 0.0) | {"0": 0.25, "10": 0.75}
CORRECTED: dict[str, Any] = {
    "ticker": "ABC",
    "action": "pass",
    "confidence": 0.5,
    "rationale": "Nothing to do.",
}
FEEDBACK: dict[str, Any] = {
    "transaction_id": "t-1",
    "feedback_type": "correction",
    "feedback_content": "The stop is too tight.",
}


@pytest.fixture
def parts() -> FakeParts:
    return FakeParts()


@pytest.fixture
async def asking(parts: FakeParts) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings.from_environ({"REDIS_URL": "memory://"}))
    app.state.sidecar = parts.sidecar
    async with client(app) as made:
        yield made


# A score


@pytest.mark.parametrize("path", ["/score/hermes", "/score/hermes/"])
async def test_a_score_is_answered_with_its_id(
    asking: httpx.AsyncClient, parts: FakeParts, path: str
) -> None:
    name = str(uuid.uuid4())
    parts.hermes.answers = [SURE]
    response = await asking.post(path, json={"proposal": CORRECTED | {"id": name}, "context": "c"})
    assert response.status_code == 200
    assert response.json() == {"proposal_id": name, "score": 0.75}
    messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, CORRECTED | {"id": name}, "c")
    assert parts.hermes.asked == [(messages, hermes_plugin.SCORE_ANSWERS)]


async def test_a_full_queue_is_429(asking: httpx.AsyncClient, parts: FakeParts) -> None:
    parts.hermes.answers = [QueueFull("The hermes queue is full.", retry_after=7)]
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "7"
    assert response.json() == {"detail": "The hermes queue is full."}
    assert parts.happened.log == []


@pytest.mark.parametrize("body", [{}, {"proposal": {}}, {"proposal": "buy"}, {"proposal": [1]}])
async def test_what_is_no_proposal_is_422(
    asking: httpx.AsyncClient, parts: FakeParts, body: dict[str, Any]
) -> None:
    response = await asking.post("/score/hermes/", json=body)
    assert response.status_code == 422
    assert [entry["loc"] for entry in response.json()["detail"]] == [["body", "proposal"]]
    assert parts.hermes.asked == []


# Feedback


async def test_feedback_is_answered_once_it_is_stored(
    asking: httpx.AsyncClient, parts: FakeParts
) -> None:
    sent = FEEDBACK | {"timestamp": "2026-01-02T03:04:05Z", "schema_version": "1.1"}
    response = await asking.post("/feedback/phi3", json=sent)
    assert response.status_code == 200
    assert response.json() == {"message": "Feedback stored.", "transaction_id": "t-1"}
    ((name, row),) = parts.happened.of("row")
    assert name == "Phi3FeedbackSchema"
    assert row["timestamp"].isoformat() == "2026-01-02T03:04:05+00:00"
    expected = FEEDBACK | {"schema_version": "1.1", "corrected_proposal": None}
    assert {column: row[column] for column in expected} == expected


@pytest.mark.parametrize(
    ("outcome", "corrected", "message"),
    [
        (
            True,
            CORRECTED,
            "Feedback stored; the corrected proposal is an example for the next ones.",
        ),
        (None, CORRECTED, "Feedback stored."),
        (
            False,
            {"ticker": "A", "action": "buy", "extra": 1},
            "Feedback stored; corrected_proposal is no valid proposal (action, confidence, extra, "
            "rationale), so no example.",
        ),
        (
            False,
            CORRECTED,
            "Feedback stored; the corrected proposal is no example, as there is no run of this "
            "transaction_id whose prompt is short enough.",
        ),
    ],
)
async def test_the_answer_says_whether_a_correction_is_an_example(
    asking: httpx.AsyncClient,
    parts: FakeParts,
    outcome: bool | None,
    corrected: dict[str, Any],
    message: str,
) -> None:
    parts.archive.outcome = outcome
    response = await asking.post(
        "/feedback/phi3/", json=FEEDBACK | {"corrected_proposal": corrected}
    )
    assert response.json() == {"message": message, "transaction_id": "t-1"}


async def test_feedback_that_cannot_be_stored_is_503(
    asking: httpx.AsyncClient, parts: FakeParts
) -> None:
    parts.archive.failure = DatabaseUnavailable("The disk is full.", retry_after=5)
    response = await asking.post("/feedback/phi3/", json=FEEDBACK)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert response.json() == {"detail": "The disk is full."}
    assert parts.happened.log == []
