"""The app as it is served, with one more route, which fails like a defect."""

from __future__ import annotations

from typing import Any

from fastapi import Body, FastAPI

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import Completion
from osiris.dependencies import CurrentSidecar
from osiris.server import app as served
from osiris.streams import result_of, with_completion

app: FastAPI = served


@app.post("/fail/{what}")
async def fail(what: str, sidecar: CurrentSidecar, prompt: str = Body(embed=True)) -> Any:
    """Asks a model, then raises an error whose text and variables quote the prompt."""
    completion = await result_of(
        with_completion(sidecar.chat.answer(prompt, 4, Deadline.after(60.0))), Completion
    )
    raise RuntimeError(f"defect after {completion.text} on {prompt}")
