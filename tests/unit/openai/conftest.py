"""A client of the app, over a fake sidecar."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar


@pytest.fixture
def fake_sidecar() -> FakeSidecar:
    return FakeSidecar()


@pytest.fixture(scope="session")
def app() -> FastAPI:
    """One app for all tests, because it takes a while to create."""
    return create_app(Settings.from_environ({"REDIS_URL": "memory://"}))


@pytest.fixture
async def asking(app: FastAPI, fake_sidecar: FakeSidecar) -> AsyncIterator[httpx.AsyncClient]:
    app.state.sidecar = fake_sidecar.sidecar
    async with client(app) as made:
        yield made
