"""The app as it is served, and one route more that fails as a defect would."""

from __future__ import annotations

import contextlib
from typing import Any

from fastapi import Body, FastAPI

from osiris.http import CurrentSidecar
from osiris.server import app as served

app: FastAPI = served


@app.post("/fail/{what}")
async def fail(what: str, sidecar: CurrentSidecar, prompt: str = Body(embed=True)) -> Any:
    """Asks a model, then raises an error whose text and variables quote the prompt."""
    async with contextlib.aclosing(sidecar.chat.answer(prompt, 4)) as stream:
        text = "".join([delta.text async for delta in stream])
    raise RuntimeError(f"defect after {text} on {prompt}")
