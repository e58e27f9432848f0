"""One sidecar with the demo models for all tests of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.clients.sidecar import KEY, demo_sidecar
from tests.live_server import LiveServer

# Without it, LiteLLM reads prices from the Internet.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with demo_sidecar(tmp_path_factory.mktemp("sidecar")) as running:
        yield running


@pytest.fixture(scope="session")
def url(server: LiveServer) -> str:
    """The base URL for clients."""
    return f"{server.url}/v1"


@pytest.fixture
def key() -> str:
    return KEY
