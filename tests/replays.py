"""Proposals of the demo models that are stored and replayed."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

import httpx

from llm_sidecar.db import cli_commands
from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    Models,
    ModelStatus,
)
from llm_sidecar.models.registry import create_models
from llm_sidecar.services import replay_command
from llm_sidecar.services.replay import Report, replay
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers
from llm_sidecar.text import find_fault
from tests.demo_cases import cases
from tests.in_process import in_process

DEMO: Final = {"SIDECAR_DEMO": "true", "FEW_SHOT_EXAMPLES": "2"}
CORRECTION: Final = {
    "ticker": "ABC",
    "action": "pass",
    "confidence": 0.5,
    "rationale": "Nothing calls for a change.",
}


async def propose(client: httpx.AsyncClient, prompt: str) -> str:
    """The transaction_id of a stored proposal."""
    answer = await client.post("/propose_trade_adjustments/", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("X-Stored", "true") == "true"
    return str(answer.json()["transaction_id"])


async def correct(client: httpx.AsyncClient, transaction_id: str) -> str:
    """Submits a correction that becomes an example; returns its feedback_id."""
    feedback = {
        "transaction_id": transaction_id,
        "feedback_type": "correction",
        "feedback_content": "It should stay.",
        "corrected_proposal": CORRECTION,
    }
    async with asyncio.timeout(60):
        while (await client.get("/health")).json()["database"]["state"] != "open":
            await asyncio.sleep(0.05)
    answer = await client.post("/feedback/phi3/", json=feedback)
    assert "is an example for the next ones" in answer.json()["message"]
    return answer.headers["X-Feedback-ID"]


async def stored(folder: Path, count: int, **environ: str) -> list[str]:
    """The transaction_ids of proposals that the demo models make, eight at a time.

    The first one is made alone and corrected, so it is an example in the prompt of the others.
    """
    drawn = (case.prompt for case in cases(2 * count))
    # The synthetic market also has texts that the server refuses.
    prompts = [prompt for prompt in drawn if find_fault(prompt) is None][:count]
    slots = asyncio.Semaphore(8)
    async with in_process(folder, **DEMO | environ) as client:

        async def queued(prompt: str) -> str:
            async with slots:
                return await propose(client, prompt)

        first = await queued(prompts[0])
        await correct(client, first)
        return [first, *await asyncio.gather(*map(queued, prompts[1:]))]


class KeptLoaded(ChatModel):
    """A model that stays loaded between replays."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        return self.model.stream(request, deadline, allow_partial=allow_partial)

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        return await self.model.score_choices(messages, choices, deadline)

    def status(self) -> ModelStatus:
        return self.model.status()

    async def start(self, adapter: Adapter | None = None) -> None:
        await self.model.start(adapter)


async def replayed(transaction_ids: Sequence[str]) -> list[Report]:
    """Replays proposals one after the other, by the settings of this process's environment."""
    settings = Settings.from_environ({**DEMO, **os.environ})
    models = create_models(settings, Observers(), lambda death: None)
    kept = Models(*map(KeptLoaded, models))
    reports = []
    try:
        for name in transaction_ids:
            query = functools.partial(replay_command.recorded, transaction_id=name)
            reports.append(await replay(await cli_commands.read(query), kept, settings))
    finally:
        for model in models:
            await model.close()
    return reports
