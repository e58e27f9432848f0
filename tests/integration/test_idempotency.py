"""Requests with an `Idempotency-Key`, with a real database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.db import Store
from llm_sidecar.models.base import Models
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.settings import Settings
from osiris.llm_client import AsyncLLMClient
from osiris.server import create_app
from tests.unit.services.samples import CRITIQUE, PROMPT, PROPOSAL, SURE, WRITTEN

FEEDBACK = {"transaction_id": "t-1", "feedback_type": "rating", "feedback_content": "good"}
KEY = {"Idempotency-Key": "k-1"}


@contextlib.asynccontextmanager
async def sidecar(folder: Path, *models: FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a sidecar in this process."""
    phi3, hermes = models or (FakeModel(), FakeModel())
    settings = Settings.from_environ({"LANCEDB_URI": str(folder), "REDIS_URL": "memory://"})
    app = create_app(settings, Models(phi3, hermes))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://sidecar", timeout=60.0) as client,
    ):
        yield client


async def rows(folder: Path, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
    store = await Store.open(folder, create=False)
    try:
        return await store.transaction(transaction_id)
    finally:
        await store.close()


async def test_feedback_that_is_sent_twice_is_one_row_also_after_a_restart(tmp_path: Path) -> None:
    async with sidecar(tmp_path) as client:
        first = await client.post("/feedback/phi3/", json=FEEDBACK, headers=KEY)
        again = await client.post("/feedback/phi3/", json=FEEDBACK, headers=KEY)
    async with sidecar(tmp_path) as client:
        restarted = await client.post("/feedback/phi3/", json=FEEDBACK, headers=KEY)
        changed = FEEDBACK | {"feedback_content": "bad"}
        other = await client.post("/feedback/phi3/", json=changed, headers=KEY)
    assert first.status_code == 200
    assert "Idempotent-Replayed" not in first.headers
    for repeated in (again, restarted):
        assert (repeated.status_code, repeated.content) == (200, first.content)
        assert repeated.headers["X-Feedback-ID"] == first.headers["X-Feedback-ID"]
        assert repeated.headers["Idempotent-Replayed"] == "true"
    assert (other.status_code, other.json()) == (
        422,
        {
            "detail": "This Idempotency-Key belongs to another request; use a new one for each "
            "request."
        },
    )
    assert len((await rows(tmp_path, "t-1"))["phi3_feedback"]) == 1


async def test_feedback_that_is_sent_many_times_at_once_is_one_row(tmp_path: Path) -> None:
    async with sidecar(tmp_path) as client:
        sending = (client.post("/feedback/phi3/", json=FEEDBACK, headers=KEY) for _ in range(16))
        answers = await asyncio.gather(*sending)
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (200, answers[0].content)
    }
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len((await rows(tmp_path, "t-1"))["phi3_feedback"]) == 1


@pytest.mark.parametrize("path", ["/score/hermes/", "/generate/hermes/"])
async def test_an_answer_outlives_a_restart(tmp_path: Path, path: str) -> None:
    body: dict[str, Any] = {"proposal": PROPOSAL} if "score" in path else {"prompt": PROMPT}
    answers = []
    for hermes in (FakeModel(SURE if "score" in path else CRITIQUE), FakeModel()):
        async with sidecar(tmp_path, FakeModel(), hermes) as client:
            answers.append(await client.post(path, json=body, headers=KEY))
    first, again = answers
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_the_client_retries_a_proposal_without_a_second_generation(tmp_path: Path) -> None:
    phi3, hermes = FakeModel(WRITTEN), FakeModel(CRITIQUE, SURE)
    async with sidecar(tmp_path, phi3, hermes) as client:
        lost: list[httpx.Response] = []

        async def lose_the_first_answer(request: httpx.Request) -> httpx.Response:
            answer = await client.send(request)
            if not lost:
                lost.append(answer)
                raise httpx.ReadError("the connection was lost")
            return answer

        async with AsyncLLMClient(
            "http://sidecar",
            backoff_factor=0,
            transport=httpx.MockTransport(lose_the_first_answer),
        ) as retrying:
            answer = await retrying.propose_trade_adjustments(PROMPT, 300)
    assert answer == lost[0].json()
    assert answer["phi3_proposal"] == PROPOSAL
    assert (len(phi3.calls), len(hermes.calls)) == (1, 2)
    found = await rows(tmp_path, answer["transaction_id"])
    assert [len(found[table]) for table in ("orchestrator_runs", "proposals", "hermes_scores")] == [
        *(1, 1, 1)
    ]
