"""The form of every error under `/v1`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from llm_sidecar.errors import InvalidRequest
from llm_sidecar.settings import Settings
from osiris.openai.errors import error_event, object_of
from osiris.server import create_app
from tests.unit.fakes import FakeSidecar

KEY = "a-key-of-the-tests-0123"
ORIGIN = "https://desk.example"
ON = {
    "REDIS_URL": "memory://",
    "CORS_ORIGINS": ORIGIN,
    "SIDECAR_API_KEYS": KEY,
    "ALLOWED_HOSTS": "test",
    "MAX_BODY_BYTES": "1024",
}
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    made = create_app(Settings.from_environ(ON))

    @made.get("/v1/broken")
    async def broken() -> None:
        raise KeyError("a defect")

    return made


@pytest.fixture
async def asking(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    app.state.sidecar = FakeSidecar(Settings.from_environ(ON)).sidecar
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN, "X-Request-ID": "order-77"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message", "code"),
    [
        ("GET", "/v1/models", {"headers": {"Host": "evil.example"}}, 400, "Host: this", None),
        (
            "GET",
            "/v1/models",
            {"headers": {"Authorization": "Bearer wrong"}},
            401,
            "This needs a valid API key",
            "invalid_api_key",
        ),
        ("GET", "/v1", {}, 404, "Not Found", None),
        ("GET", "/v1/nothing", {}, 404, "Not Found", None),
        (
            "GET",
            "/v1/models/gpt-4",
            {},
            404,
            "model: there is no such model; GET /v1/models lists them",
            "model_not_found",
        ),
        ("GET", CHAT, {}, 405, "This path takes POST.", None),
        ("POST", CHAT, {"json": {"model": "x" * 2000}}, 413, "The request's body is larger", None),
        ("POST", CHAT, {"content": b"{}"}, 415, "Content-Type: send", None),
        ("POST", CHAT, {"content": b"\0", "headers": JSON}, 400, "The body is not JSON", None),
        (
            "POST",
            CHAT,
            {"content": b"{", "headers": JSON},
            400,
            "JSON decode error",
            "invalid_json",
        ),
        (
            "POST",
            CHAT,
            {"content": b"[]", "headers": JSON},
            400,
            "Input should be an object",
            "invalid_type",
        ),
        ("GET", "/v1/broken", {}, 500, "An unexpected error occurred; the log has it under", None),
    ],
)
async def test_every_error_is_an_error_object(
    asking: httpx.AsyncClient,
    method: str,
    path: str,
    options: dict[str, Any],
    status: int,
    message: str,
    code: str | None,
) -> None:
    response = await asking.request(method, path, **options)
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert error["message"].startswith(message)
    kind = "server_error" if status == 500 else "invalid_request_error"
    assert (error["type"], error["code"]) == (kind, code)
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-ID"] == "order-77"
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert ("WWW-Authenticate" in response.headers) == (status == 401)
    assert response.headers.get("Allow") == ("POST" if status == 405 else None)


async def test_head_has_the_status_of_get(asking: httpx.AsyncClient) -> None:
    for path, status in (("/v1/models", 200), ("/v1/models/phi3/", 200), ("/v1/models/x", 404)):
        get, head = await asking.get(path), await asking.head(path)
        assert (get.status_code, head.status_code, head.content) == (status, status, b"")
        assert head.headers["Content-Length"] == get.headers["Content-Length"]


async def test_refusals_of_a_busy_or_draining_server_are_error_objects(
    app: FastAPI, asking: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.shutdown, "draining", True)
    response = await asking.get("/v1/models")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert response.headers["Retry-After"] == "5"


async def test_other_paths_keep_their_form(asking: httpx.AsyncClient) -> None:
    for path in ("/nothing", "/v10/models", "/v"):
        assert (await asking.get(path)).json() == {"detail": "Not Found"}


def scope_of(path: str) -> dict[str, Any]:
    state = {"request_id": "order-77"}
    return {"type": "http", "path": path, "root_path": "", "headers": [], "state": state}


def test_a_defect_is_not_described() -> None:
    assert object_of(KeyError("a prompt"), scope_of("/v1/models"))["error"] == {
        "message": "An unexpected error occurred; the log has it under order-77.",
        "type": "server_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        ("/v1/chat/completions", "prompt", "messages"),
        ("/v1/chat/completions", "schema", "response_format"),
        ("/v1/chat/completions", "max_length", "max_tokens"),
        ("/v1/chat/completions", "tools", "tools"),
        ("/v1/responses", "prompt", "input"),
        ("/v1/responses", "schema", "text.format"),
        ("/v1/responses", "max_length", "max_output_tokens"),
        ("/v1/responses", "logprobs", "include"),
        ("/v1/completions", "prompt", "prompt"),
        ("/v1/completions", "max_length", "max_tokens"),
        ("/v1/audio/speech", "text", "input"),
        ("/v1/decisions", "input", "input"),
    ],
)
def test_an_error_names_the_field_of_its_path_also_in_a_stream(
    path: str, field: str, param: str
) -> None:
    error = InvalidRequest("it names no max_length: and no context", field=field)
    expected = {
        "message": f"{param}: it names no max_length: and no context",
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }
    assert object_of(error, scope_of(path)) == {"error": expected}
    request = Request(scope_of(f"{path}/"))
    assert json.loads(str(error_event(request, error).data)) == {"error": expected}


def test_an_error_without_a_field_has_no_param() -> None:
    error = InvalidRequest("two things: do not fit", exceeds_context=True)
    assert object_of(error, scope_of("/v1/responses"))["error"] == {
        "message": "two things: do not fit",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
