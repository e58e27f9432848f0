"""Remote models with servers in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr

from llm_sidecar.models.remote.model import RemoteModel
from tests.unit.remote.openai_server import (
    OpenAIServer,
    transport,
)
from tests.unit.remote.samples import Make


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes remote models from servers by name; closes them at the end."""
    made: list[RemoteModel] = []

    def make(name: str = "hermes", *, options: Any = None, **servers: OpenAIServer) -> RemoteModel:
        urls = [SecretStr(f"http://{host}/v1") for host in servers]
        made.append(RemoteModel(name, urls, transport=transport(**servers), **(options or {})))
        return made[-1]

    yield make
    for model in made:
        await model.close()
