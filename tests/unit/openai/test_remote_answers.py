"""Schemas and tools under `/v1` on a model of another server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from pydantic import SecretStr

from llm_sidecar.models.fake import FakeModel
from llm_sidecar.models.remote.model import RemoteModel
from tests.unit.fakes import FakeSidecar
from tests.unit.remote.openai_server import OpenAIServer, Stream, chunk, events, transport, usage

CHAT: dict[str, Any] = {"model": "hermes", "messages": [{"role": "user", "content": "What now?"}]}
CLOSE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "close",
        "parameters": {"type": "object", "properties": {"share": {"enum": [0.5, 1]}}},
    },
}
BROKEN = "does not follow its JSON schema"


def formatted(schema: Any) -> dict[str, Any]:
    answer_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return CHAT | {"response_format": answer_format}


SIDE = formatted({"type": "object", "properties": {"side": {"enum": ["buy", "sell"]}}})


@pytest.fixture
def server() -> OpenAIServer:
    server = OpenAIServer()
    server.schema_formats = {"json_schema"}
    return server


@pytest.fixture
async def fake_sidecar(server: OpenAIServer) -> AsyncIterator[FakeSidecar]:
    hermes = RemoteModel("hermes", [SecretStr("http://a/v1")], transport=transport(a=server))
    yield FakeSidecar(hermes=cast(FakeModel, hermes))
    await hermes.close()


def writes(server: OpenAIServer, text: str) -> None:
    server.answers.append(Stream(events(chunk(text), chunk("", "stop"), usage(11, 3))))


async def test_an_answer_that_follows_its_schema_is_returned(
    asking: httpx.AsyncClient, server: OpenAIServer
) -> None:
    writes(server, '{"side":"buy"}')
    response = await asking.post("/v1/chat/completions", json=SIDE)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == '{"side":"buy"}'


async def test_an_answer_that_breaks_its_schema_is_503(
    asking: httpx.AsyncClient, server: OpenAIServer
) -> None:
    writes(server, '{"side":"hold"}')
    response = await asking.post("/v1/chat/completions", json=SIDE)
    assert response.status_code == 503
    assert BROKEN in response.json()["error"]["message"]
    assert response.headers["Retry-After"] == "1"


async def test_a_stream_that_breaks_its_schema_ends_with_an_error(
    asking: httpx.AsyncClient, server: OpenAIServer
) -> None:
    writes(server, '{"side":"hold"}')
    response = await asking.post("/v1/chat/completions", json=SIDE | {"stream": True})
    assert response.status_code == 200
    *_, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert BROKEN in json.loads(last.removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize(
    "call",
    [
        '{"name":"open","arguments":{}}',
        '{"name":"close","arguments":{"share":2}}',
        '{"name":"close","arguments":{"count":1}}',
    ],
)
async def test_a_call_that_breaks_the_schema_of_its_tool_is_503(
    asking: httpx.AsyncClient, server: OpenAIServer, call: str
) -> None:
    writes(server, call)
    response = await asking.post("/v1/chat/completions", json=CHAT | {"tools": [CLOSE]})
    assert response.status_code == 503
    assert BROKEN in response.json()["error"]["message"]


@pytest.mark.parametrize("call", ['{"name":"close","arguments":{"share":1}}'])
async def test_a_call_that_follows_the_schema_of_its_tool_is_returned(
    asking: httpx.AsyncClient, server: OpenAIServer, call: str
) -> None:
    writes(server, call)
    response = await asking.post("/v1/chat/completions", json=CHAT | {"tools": [CLOSE]})
    assert response.status_code == 200, response.text
    (made,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert made["function"] == {"name": "close", "arguments": '{"share":1}'}


async def test_an_unsupported_keyword_is_400_and_named(
    asking: httpx.AsyncClient, server: OpenAIServer
) -> None:
    response = await asking.post(
        "/v1/chat/completions", json=formatted({"type": "array", "uniqueItems": True})
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert "uniqueItems is not supported" in error["message"]
    assert server.requests == []


async def test_an_unsupported_keyword_of_a_tool_is_400_and_named(
    asking: httpx.AsyncClient, server: OpenAIServer
) -> None:
    tool = {
        "type": "function",
        "function": {"name": "a", "parameters": {"properties": {"b": {"uniqueItems": True}}}},
    }
    response = await asking.post("/v1/chat/completions", json=CHAT | {"tools": [tool]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "tools"
    assert "uniqueItems is not supported" in error["message"]
    assert server.requests == []
