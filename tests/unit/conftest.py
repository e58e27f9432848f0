"""Apps that all tests share, and a fake sidecar for each test."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI

from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar


@pytest.fixture(scope="session")
def app_of() -> Callable[..., FastAPI]:
    """Creates the app of an environment, once: that takes longer than a hundred requests.

    A test sets `app.state.sidecar` and changes nothing else.
    """

    @functools.cache
    def made(**environ: str) -> FastAPI:
        return create_app(Settings.from_environ({"REDIS_URL": "memory://", **environ}))

    return made


@pytest.fixture(scope="session")
def app(app_of: Callable[..., FastAPI]) -> FastAPI:
    """The app without settings."""
    return app_of()


@pytest.fixture
def fake_sidecar() -> FakeSidecar:
    """A new fake sidecar."""
    return FakeSidecar()


@pytest.fixture
async def asking(app: FastAPI, fake_sidecar: FakeSidecar) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, over the fake sidecar."""
    app.state.sidecar = fake_sidecar.sidecar
    async with client(app) as made:
        yield made
