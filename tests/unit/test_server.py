"""Common features of all answers: HEAD, CORS, and the form of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llm_sidecar.db import Correction
from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.unit.asgi import client
from tests.unit.fakes import FakeSidecar

ORIGIN = "https://desk.example"
KEY = "a-key-of-the-tests-0123"
DESK = {"Origin": ORIGIN, "X-API-Key": KEY}
EXPOSED = (
    "Allow, Idempotent-Replayed, Retry-After, WWW-Authenticate, X-Completion-Tokens, "
    "X-Feedback-ID, X-Finish-Reason, X-Grounded, X-Hermes-Answer-Mass, X-Hermes-Score, "
    "X-Hermes-Score-Reliable, X-Model, X-Prompt-Tokens, X-Request-ID, X-Stored, X-Voice, "
    "X-Voice-Reference, traceresponse"
)
ON = {
    "REDIS_URL": "memory://",
    "CORS_ORIGINS": ORIGIN,
    "SIDECAR_API_KEYS": KEY,
    "ALLOWED_HOSTS": "test",
    "ENABLE_METRICS": "true",
    "MAX_BODY_BYTES": "1024",
    "MAX_AUDIO_LISTENERS": "1",
}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    made = create_app(Settings.from_environ(ON))

    @made.get("/broken")
    async def broken() -> None:
        raise KeyError("a defect")

    return made


@pytest.fixture
def fake_sidecar(app: FastAPI) -> FakeSidecar:
    made = FakeSidecar(Settings.from_environ(ON))
    app.state.sidecar = made.sidecar
    return made


@pytest.fixture
async def asking(app: FastAPI, fake_sidecar: FakeSidecar) -> AsyncIterator[httpx.AsyncClient]:
    # As in a server, an unexpected error is answered and not raised here.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def without_id(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name != "x-request-id"}


# HEAD


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/health/ready", "/examples", "/debug/prof"]
)
async def test_head_has_the_status_and_the_headers_of_get(
    asking: httpx.AsyncClient,
    fake_sidecar: FakeSidecar,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    slash: str,
) -> None:
    monkeypatch.setattr(fake_sidecar.sidecar.health, "report", lambda: {"status": "ok"})
    monkeypatch.setattr(fake_sidecar.sidecar.health, "missing", lambda: {"phi3": "It is loading."})
    fake_sidecar.sidecar.few_shot.corrections = (Correction("prompt", {"n": 1}, "t-1", "f-1"),)
    get = await asking.get(path + slash, headers=DESK)
    head = await asking.head(path + slash, headers=DESK)
    expected = {"/health/ready": 503, "/debug/prof": 404}.get(path, 200)
    assert (get.status_code, head.status_code) == (expected, expected)
    assert without_id(head) == without_id(get)
    assert int(head.headers["Content-Length"]) == len(get.content) > 0
    assert head.content == b""


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_head_answers_on_the_documents(asking: httpx.AsyncClient, path: str) -> None:
    get = await asking.get(path, headers=DESK)
    head = await asking.head(path, headers=DESK)
    assert (head.status_code, head.content) == (200, b"")
    assert without_id(head) == without_id(get)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_head_answers_on_the_metrics(asking: httpx.AsyncClient, path: str) -> None:
    head = await asking.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("path", ["/stream/audio", "/stream/audio/"])
async def test_head_opens_no_stream(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar, path: str
) -> None:
    # The fake event bus has no listeners, so registering one fails.
    head = await asking.head(path, headers=DESK)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert fake_sidecar.sidecar.listeners.count == 0


async def test_head_is_refused_when_there_are_too_many_listeners(
    asking: httpx.AsyncClient, fake_sidecar: FakeSidecar
) -> None:
    fake_sidecar.sidecar.listeners.count = 1
    head = await asking.head("/stream/audio", headers=DESK)
    assert (head.status_code, head.headers["Retry-After"]) == (429, "5")


async def test_head_is_not_documented_and_is_counted_as_head(
    app: FastAPI, asking: httpx.AsyncClient
) -> None:
    methods = {method for operations in app.openapi()["paths"].values() for method in operations}
    assert methods == {"get", "post", "delete"}
    await asking.head("/examples/", headers=DESK)
    text = (await asking.get("/metrics")).text
    assert 'http_requests_total{handler="/examples/",method="HEAD",status="2xx"}' in text


# CORS


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/examples/", {}, 200),
        ("GET", "/examples/", {"headers": {"Host": "evil.example"}}, 400),
        ("GET", "/examples/", {"headers": {"X-API-Key": ""}}, 401),
        ("GET", "/nothing", {}, 404),
        ("PUT", "/generate/", {}, 405),
        ("POST", "/generate/", {"json": {"prompt": "x" * 2000}}, 413),
        ("POST", "/generate/", {"content": b"prompt"}, 415),
        ("POST", "/generate/", {"json": {}}, 422),
        ("GET", "/broken", {}, 500),
    ],
)
async def test_every_answer_has_the_cors_and_security_headers(
    asking: httpx.AsyncClient, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    headers = {**DESK, "X-Request-ID": "order-77", **options.get("headers", {})}
    response = await asking.request(method, path, **(options | {"headers": headers}))
    assert response.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Expose-Headers"] == EXPOSED
    assert response.headers["Vary"] == "Origin"
    assert response.headers["X-Request-ID"] == "order-77"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    if status >= 400:
        assert set(response.json()) == {"detail"}


async def test_an_unexpected_error_names_only_the_request_id(
    asking: httpx.AsyncClient,
) -> None:
    response = await asking.get("/broken", headers={**DESK, "X-Request-ID": "order-78"})
    assert response.json() == {
        "detail": "An unexpected error occurred; the log has it under order-78."
    }


async def test_a_refusal_while_the_server_drains_has_the_cors_headers(
    app: FastAPI, asking: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.shutdown, "draining", True)
    response = await asking.get("/examples/", headers=DESK)
    assert response.status_code == 503
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert (await asking.options("/generate/", headers=asked)).status_code == 200


@pytest.mark.parametrize("method", ["DELETE", "GET", "HEAD", "POST"])
async def test_a_preflight_needs_no_key_and_allows_each_header(
    asking: httpx.AsyncClient, method: str
) -> None:
    wanted = (
        "authorization,content-type,x-api-key,x-request-id,idempotency-key,last-event-id,"
        "traceparent,tracestate,baggage,openai-organization,x-stainless-lang,"
        "x-stainless-retry-count"
    )
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": wanted,
    }
    response = await asking.options("/feedback/some-id", headers=asked)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Methods"] == "DELETE, GET, HEAD, POST"
    allowed = response.headers["Access-Control-Allow-Headers"].lower().split(", ")
    assert set(wanted.split(",")) <= set(allowed)
    assert "Origin" in response.headers["Vary"].split(", ")


async def test_another_origin_is_not_allowed(asking: httpx.AsyncClient) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = await asking.options("/generate/", headers=asked)
    assert preflight.status_code == 400
    assert "Access-Control-Allow-Origin" not in preflight.headers
    for headers in ({"Origin": "https://evil.example"}, {}):
        response = await asking.get("/health/live", headers=headers)
        assert "Access-Control-Allow-Origin" not in response.headers
        # A cache must not serve this answer to the allowed origin.
        assert response.headers["Vary"] == "Origin"


# Unknown paths and methods


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate/", "POST"),
        ("HEAD", "/speak", "POST"),
        ("PUT", "/feedback/some-id", "DELETE"),
        ("POST", "/examples", "GET, HEAD"),
        ("POST", "/health/live/", "GET, HEAD"),
        ("OPTIONS", "/metrics", "GET, HEAD"),
        ("BREW", "/docs", "GET, HEAD"),
    ],
)
async def test_an_unsupported_method_is_405_and_the_answer_names_the_supported_ones(
    asking: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await asking.request(method, path, headers={"X-API-Key": KEY})
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    if method != "HEAD":
        detail = f"This path takes {allowed.replace(', ', ' and ')}."
        assert response.json() == {"detail": detail}


async def test_an_unknown_path_is_404(asking: httpx.AsyncClient) -> None:
    for path in ("/nothing", "/generate/gpt/", "//generate"):
        response = await asking.post(path, headers={"X-API-Key": KEY})
        assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


@pytest.fixture(scope="module")
def off(app_of: Callable[..., FastAPI]) -> FastAPI:
    return app_of()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/metrics", "Metrics are off; ENABLE_METRICS=true turns them on."),
        ("/debug/prof", "Profiling is off; ENABLE_PROFILING=true turns it on."),
    ],
)
async def test_a_path_that_is_off_is_404_and_the_detail_names_its_variable(
    off: FastAPI, method: str, path: str, slash: str, detail: str
) -> None:
    async with client(off) as asking:
        response = await asking.request(method, path + slash)
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/json"
    if method == "GET":
        assert response.json() == {"detail": detail}


async def test_metrics_that_are_off_are_not_documented(off: FastAPI, app: FastAPI) -> None:
    assert "/metrics" not in off.openapi()["paths"]
    assert "/metrics" in app.openapi()["paths"]


def test_415_is_documented_for_every_path_with_a_body(app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            assert ("415" in operation["responses"]) == ("requestBody" in operation), path
