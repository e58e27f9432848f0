"""The app as it is served, with models that answer at once, and routes that count what runs.

`QUICK_SECONDS` is the time of each generation.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import (
    ChoiceScores,
    Completion,
    Delta,
    GenerationRequest,
    Message,
    Models,
)
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.settings import Settings
from osiris import logs
from osiris.server import create_app
from tests.unit.services.samples import CRITIQUE, SURE, WRITTEN

_SECONDS = float(os.environ.get("QUICK_SECONDS", "0"))


class QuickModel(FakeModel):
    """Writes the same answer and gives the same scores again and again; keeps no calls.

    Attributes:
        running: the number of generations that run now.
    """

    def __init__(self, written: Completion) -> None:
        super().__init__()
        self.running = 0
        self._written = written

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        self.running += 1
        try:
            await asyncio.sleep(_SECONDS)
            self.calls, self.answers = [], [self._written]
            async for delta in super().stream(request, deadline, allow_partial=allow_partial):
                yield delta
        finally:
            self.running -= 1

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        return SURE

    async def prefill(self, prefix: GenerationRequest) -> None:
        return


_settings = Settings.from_environ()
logs.configure(_settings.telemetry.log_format)
_models = QuickModel(WRITTEN), QuickModel(CRITIQUE)
app = create_app(_settings, Models(*_models))


@app.get("/tasks")
async def tasks() -> int:
    """How many tasks of asyncio there are, this request's included."""
    return len(asyncio.all_tasks())


@app.get("/running")
async def running() -> int:
    """How many generations run."""
    return sum(model.running for model in _models)
