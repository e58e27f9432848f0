"""Runs the app in the test's own process, with its database and its voice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from uvicorn import Config
from uvicorn.server import ServerState

from llm_sidecar.models.base import Models
from llm_sidecar.settings import Settings
from osiris.connection import Connection, limit_connections
from osiris.server import create_app
from osiris.shutdown import Shutdown


@contextlib.asynccontextmanager
async def in_process(folder: Path, **environ: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose configuration is `environ` alone, with its data in `folder`.

    There is no HTTP. The client gets an answer only at its end, so it cannot read a stream.
    """
    app = create_app(_settings(folder, environ))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://sidecar", timeout=60.0
        ) as client,
    ):
        yield client


class Served:
    """An app that is served over HTTP.

    Attributes:
        url: its base URL.
        shutdown: the shutdown of the app.
    """

    def __init__(self, port: int, state: ServerState, shutdown: Shutdown) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.shutdown = shutdown
        self._state = state

    @property
    def connections(self) -> list[Connection]:
        """The open connections."""
        return list(self._state.connections)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def over_http(folder: Path, models: Models, **environ: str) -> AsyncIterator[Served]:
    """Serves an app with these models on a free port, in the event loop of the test."""
    settings = _settings(folder, environ)
    app = create_app(settings, models)
    config = Config(app, log_config=None, ws="none", interface="asgi3", lifespan="off")
    config.load()
    shutdown: Shutdown = app.state.shutdown
    limit_connections(config, settings, lambda: shutdown.draining)
    state, loop = ServerState(), asyncio.get_running_loop()

    def make_connection() -> asyncio.Protocol:
        make: Any = config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=config, server_state=state, app_state={}, _loop=loop
        )
        return protocol

    async with app.router.lifespan_context(app):
        server = await loop.create_server(make_connection, "127.0.0.1", 0)
        try:
            yield Served(server.sockets[0].getsockname()[1], state, shutdown)
        finally:
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()
            await asyncio.gather(*state.tasks, return_exceptions=True)


def _settings(folder: Path, environ: dict[str, str]) -> Settings:
    usual = {
        "LANCEDB_URI": str(folder / "lancedb"),
        "REDIS_URL": "memory://",
        "TTS_VOICE": "espeak",
    }
    return Settings.from_environ(usual | environ)
