"""The routes of scores, feedback and examples, with a fake sidecar."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llm_sidecar import hermes_plugin
from llm_sidecar.db import Correction, Phi3FeedbackSchema
from llm_sidecar.errors import DatabaseUnavailable, QueueFull
from llm_sidecar.models.base import ChoiceScores
from llm_sidecar.services.example_rules import Outcome
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar, scores

SURE = scores(_0=0.25, _10=0.75)
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


# A score


@pytest.mark.parametrize("path", ["/score/hermes", "/score/hermes/"])
async def test_a_score_is_answered_with_its_id(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, path: str
) -> None:
    name = str(uuid.uuid4())
    fake_sidecar.hermes.answers = [SURE]
    response = await asking.post(path, json={"proposal": CORRECTED | {"id": name}, "context": "c"})
    assert response.status_code == 200
    assert response.json() == {"proposal_id": name, "score": 0.75}
    assert response.headers["X-Hermes-Answer-Mass"] == "1.000000"
    assert response.headers["X-Hermes-Score-Reliable"] == "true"
    messages = hermes_plugin.score_messages(CORRECTED | {"id": name}, "c")
    assert fake_sidecar.hermes.requests == [(messages, hermes_plugin.SCORE_ANSWERS)]


async def test_a_score_of_little_answer_mass_is_marked_in_its_headers(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [scores(_4=0.3125)]
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert response.json()["score"] == 0.4
    assert response.headers["X-Hermes-Answer-Mass"] == "0.312500"
    assert response.headers["X-Hermes-Score-Reliable"] == "false"


async def test_a_model_that_leaves_an_answer_out_is_503(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [ChoiceScores({"7": 1.0})]
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json()["detail"] == (
        "hermes gave no score: the answers 0, 1, 2, 3, 4, 5, 6, 8, 9, 10 have no probabilities"
    )
    assert fake_sidecar.happened.log == []


async def test_a_full_queue_is_429(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.hermes.answers = [QueueFull("The hermes queue is full.", retry_after=7)]
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "7"
    assert response.json() == {"detail": "The hermes queue is full."}
    assert fake_sidecar.happened.log == []


@pytest.mark.parametrize("body", [{}, {"proposal": {}}, {"proposal": "buy"}, {"proposal": [1]}])
async def test_an_invalid_proposal_is_422(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, body: dict[str, Any]
) -> None:
    response = await asking.post("/score/hermes/", json=body)
    assert response.status_code == 422
    assert [entry["loc"] for entry in response.json()["detail"]] == [["body", "proposal"]]
    assert fake_sidecar.hermes.requests == []


async def test_a_score_that_is_not_stored_has_x_stored_false(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.hermes.answers = [SURE, SURE]
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert "X-Stored" not in response.headers
    fake_sidecar.store.full = DatabaseUnavailable("The disk is full.")
    response = await asking.post("/score/hermes/", json={"proposal": CORRECTED})
    assert (response.status_code, response.json()["score"]) == (200, 0.75)
    assert response.headers["X-Stored"] == "false"


# Feedback


async def test_feedback_is_answered_once_it_is_stored(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    sent = FEEDBACK | {"timestamp": "2026-01-02T03:04:05Z", "schema_version": "1.1"}
    response = await asking.post("/feedback/phi3", json=sent)
    assert response.status_code == 200
    assert response.json() == {"message": "Feedback stored.", "transaction_id": "t-1"}
    ((name, row),) = fake_sidecar.happened.of("row")
    assert name == "Phi3FeedbackSchema"
    assert response.headers["X-Feedback-ID"] == row["feedback_id"]
    assert row["timestamp"].isoformat() == "2026-01-02T03:04:05+00:00"
    expected = FEEDBACK | {"schema_version": "1.1", "corrected_proposal": None}
    assert {column: row[column] for column in expected} == expected


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("headers", "trace"),
    [({"traceparent": TRACE}, TRACE), ({"traceparent": "x"}, None), ({}, None)],
)
async def test_an_event_belongs_to_the_trace_that_the_client_sent(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    headers: dict[str, str],
    trace: str | None,
) -> None:
    await asking.post("/feedback/phi3", json=FEEDBACK, headers=headers)
    (transaction,) = fake_sidecar.store.commits
    assert [event.traceparent for event in transaction.events] == [trace]


KEY_OF_DESK, UNNAMED_KEY = "first-key-0123456789", "second-key-012345678"


@pytest.mark.parametrize(
    ("keys", "key", "author"),
    [
        (f"desk={KEY_OF_DESK},{UNNAMED_KEY}", KEY_OF_DESK, "desk"),
        # The position of a key is not a name.
        (f"desk={KEY_OF_DESK},{UNNAMED_KEY}", UNNAMED_KEY, None),
        ("", KEY_OF_DESK, None),
    ],
)
async def test_the_name_of_the_key_is_the_author_of_feedback(
    app_of: Callable[..., FastAPI],
    fake_sidecar: FakeSidecar,
    keys: str,
    key: str,
    author: str | None,
) -> None:
    app = app_of(SIDECAR_API_KEYS=keys)
    app.state.sidecar = fake_sidecar.sidecar
    async with client(app) as asking:
        response = await asking.post("/feedback/phi3/", json=FEEDBACK, headers={"X-API-Key": key})
        assert response.status_code == 200
        forged = FEEDBACK | {"author": "risk"}
        response = await asking.post("/feedback/phi3/", json=forged, headers={"X-API-Key": key})
        assert response.status_code == 422
    ((_, row),), ((_, event),) = fake_sidecar.happened.of("row"), fake_sidecar.happened.of("event")
    assert (row["author"], event.get("author")) == (author, author)


NO_EXAMPLE = "Feedback stored; the corrected proposal is not an example, because "
MESSAGES = {
    Outcome.EXAMPLE: "Feedback stored; the corrected proposal is an example for the next ones.",
    Outcome.NO_CORRECTION: "Feedback stored.",
    Outcome.PROPOSAL_TOO_LONG: f"{NO_EXAMPLE}it takes more than 500 characters as JSON.",
    Outcome.OFF: f"{NO_EXAMPLE}few-shot examples are off; FEW_SHOT_EXAMPLES turns them on.",
    Outcome.DATABASE_AWAY: "Feedback stored; until the database is back, it is not known whether "
    "the corrected proposal is an example.",
    Outcome.NO_RUN: f"{NO_EXAMPLE}no run with this transaction_id is stored.",
    Outcome.PROMPT_NOT_TEXT: f"{NO_EXAMPLE}the prompt of its run has control characters.",
    Outcome.PROMPT_TOO_LONG: f"{NO_EXAMPLE}the prompt of its run has more than 2000 characters.",
    Outcome.TOO_MANY_TOKENS: f"{NO_EXAMPLE}it and the prompt of its run may take more than 3000 "
    "tokens, or more than half of the model's context (each byte counts as one token).",
    Outcome.WITHDRAWN: f"{NO_EXAMPLE}this feedback was withdrawn.",
    Outcome.REPLACED: f"{NO_EXAMPLE}a newer correction of the same run is one.",
    Outcome.CROWDED_OUT: f"{NO_EXAMPLE}newer ones leave no space for it.",
}


def outcome_is(fake_sidecar: FakeSidecar, outcome: Outcome) -> None:
    """Every feedback has this outcome."""

    async def given(feedback: Phi3FeedbackSchema) -> Outcome:
        return outcome

    fake_sidecar.sidecar.few_shot.outcome = given  # type: ignore[method-assign]


@pytest.mark.parametrize("outcome", MESSAGES)
async def test_the_answer_says_whether_a_correction_is_an_example(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, outcome: Outcome
) -> None:
    outcome_is(fake_sidecar, outcome)
    sent = FEEDBACK | {"corrected_proposal": CORRECTED}
    response = await asking.post("/feedback/phi3/", json=sent)
    assert response.json() == {"message": MESSAGES[outcome], "transaction_id": "t-1"}


@pytest.mark.parametrize(
    ("corrected", "fields"),
    [
        ({"ticker": "A", "action": "buy"}, "action, confidence, rationale"),
        # An unknown key of the proposal is not shown.
        (CORRECTED | {"a secret": 1}, "*"),
        (CORRECTED | {"a secret": 1, "another": 2, "ticker": ""}, "*, ticker"),
    ],
)
async def test_the_answer_names_the_invalid_fields_of_a_correction(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, corrected: dict[str, Any], fields: str
) -> None:
    sent = FEEDBACK | {"corrected_proposal": corrected}
    response = await asking.post("/feedback/phi3/", json=sent)
    assert response.json()["message"] == (
        f"Feedback stored; corrected_proposal is not a valid proposal ({fields}), so it is not an "
        "example."
    )


def test_every_outcome_has_its_message() -> None:
    assert set(MESSAGES) | {Outcome.INVALID} == set(Outcome)


async def test_feedback_that_cannot_be_stored_is_503(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.store.full = DatabaseUnavailable("The disk is full.", retry_after=5)
    response = await asking.post("/feedback/phi3/", json=FEEDBACK)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert response.json() == {"detail": "The disk is full."}
    assert fake_sidecar.happened.log == []


@pytest.mark.parametrize("feedback_id", ["f-1", "theirs/and/ours"])
async def test_feedback_is_withdrawn_by_its_id(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, feedback_id: str
) -> None:
    fake_sidecar.store.transactions = {feedback_id: "t-1"}
    for _ in range(2):
        response = await asking.delete(f"/feedback/{feedback_id}")
        assert response.status_code == 200
        assert response.json() == {"message": "Feedback withdrawn.", "feedback_id": feedback_id}
    response = await asking.delete("/feedback/other/")
    assert response.status_code == 404
    assert response.json() == {"detail": "There is no feedback with this feedback_id."}


# Examples


def used(count: int) -> tuple[Correction, ...]:
    return tuple(Correction(f"prompt {n}", {"n": n}, f"t-{n}", f"f-{n}") for n in range(count))


def item(number: int) -> dict[str, Any]:
    return {
        "transaction_id": f"t-{number}",
        "feedback_id": f"f-{number}",
        "prompt": f"prompt {number}",
        "proposal": {"n": number},
    }


@pytest.mark.parametrize(
    ("query", "numbers", "following"),
    [
        ("", [0, 1, 2], None),
        ("?limit=3", [0, 1, 2], None),
        ("?limit=2", [0, 1], "f-1"),
        ("?limit=2&before=f-1", [2], None),
        ("?limit=1&before=f-0", [1], "f-1"),
        ("?before=f-2", [], None),
    ],
)
async def test_the_examples_in_use_are_listed_oldest_first_in_pages(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    query: str,
    numbers: list[int],
    following: str | None,
) -> None:
    fake_sidecar.sidecar.few_shot.corrections = used(3)
    response = await asking.get(f"/examples/{query}")
    assert response.json() == {"items": [item(n) for n in numbers], "next": following}


async def test_an_unknown_page_is_422(asking: httpx.AsyncClient, fake_sidecar: FakeSidecar) -> None:
    fake_sidecar.sidecar.few_shot.corrections = used(3)
    response = await asking.get("/examples/?before=f-9")
    assert response.status_code == 422
    assert response.json() == {
        "detail": "before: no page ended there; leave it out for the first page."
    }
    for query in ("?limit=0", "?limit=501", "?limit=many"):
        assert (await asking.get(f"/examples/{query}")).status_code == 422
