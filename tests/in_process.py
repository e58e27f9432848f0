"""Runs the app in the test's own process, with its database and its voice, but without HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from llm_sidecar.settings import Settings
from osiris.server import create_app


@contextlib.asynccontextmanager
async def in_process(folder: Path, **environ: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose configuration is `environ` alone, with its data in `folder`.

    The client gets an answer when it has ended, so it cannot listen to a stream.
    """
    settings = {
        "LANCEDB_URI": str(folder / "lancedb"),
        "REDIS_URL": "memory://",
        "TTS_VOICE": "espeak",
    }
    settings |= environ
    app = create_app(Settings.from_environ(settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://sidecar", timeout=60.0
        ) as client,
    ):
        yield client
