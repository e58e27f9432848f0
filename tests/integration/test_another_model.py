"""A model that no file of the server knows: one class of twenty lines serves the routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import httpx

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import Store
from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import (
    ChatModel,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    Models,
    ModelStatus,
)
from llm_sidecar.settings import Settings
from osiris.server import create_app

PROPOSAL = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "It holds."}


class EchoModel(ChatModel):
    """Repeats the last turn; under guidance, it proposes nothing."""

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        text = request.messages[-1]["content"]
        if request.guidance is not None:
            text = proposals.dumps(PROPOSAL)
        for word in text.split(" ")[:-1]:
            yield Delta(f"{word} ", "echo")
        yield Delta(text.split(" ")[-1], "echo", None, 7, 9, finish_reason="stop")

    async def score_choices(
        self, messages: Sequence[Message], choices: Sequence[str], deadline: Deadline | None = None
    ) -> ChoiceScores:
        return ChoiceScores({choice: 1 / len(choices) for choice in choices})

    def status(self) -> ModelStatus:
        return ModelStatus(model="echo")


async def test_another_model_serves_the_routes_without_a_change_anywhere(tmp_path: Path) -> None:
    environ = {"LANCEDB_URI": str(tmp_path / "db"), "REDIS_URL": "memory://"}
    app = create_app(Settings.from_environ(environ), Models(EchoModel(), EchoModel()))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://sidecar") as client,
    ):
        answer = await client.post("/generate/hermes/", json={"prompt": "Hold or sell?"})
        assert (answer.status_code, answer.json()) == (200, {"generated_text": "Hold or sell?"})
        assert answer.headers["X-Model"] == "echo"
        assert answer.headers["X-Completion-Tokens"] == "9"
        run = await client.post("/propose_trade_adjustments/", json={"prompt": "Long ABC."})
        assert run.status_code == 200
        name = run.json()["transaction_id"]
        assert run.json()["phi3_proposal"] == PROPOSAL
        assert run.json()["hermes_assessment"].endswith(hermes_plugin.CRITIQUE_TASK)
        assert (run.headers["X-Hermes-Score"], run.headers["X-Model"]) == ("0.500000", "echo")
        async with asyncio.timeout(30):
            while (health := (await client.get("/health")).json())["database"]["state"] != "open":
                await asyncio.sleep(0.02)
        assert {model["model"] for model in health["models"].values()} == {"echo"}
        assert health["phi3_loaded"] is health["hermes_loaded"] is True
    store = await Store.open(tmp_path / "db")
    try:
        (row,) = await store.last("orchestrator_runs", 2)
    finally:
        await store.close()
    assert (row["run_id"], row["status"]) == (name, "success")
