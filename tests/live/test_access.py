"""API keys, limits on requests, and the headers of every answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.settings import Settings
from osiris.llm_client import LLMClient
from osiris.server import create_app
from tests.in_process import in_process
from tests.live_server import LiveServer, serve

KEYS = ("first-key-0123456789", "second-key-012345678")
BEARER = {"Authorization": f"Bearer {KEYS[0]}"}
LIMITS = {
    "MAX_CONCURRENT_REQUESTS": "2",
    "MAX_PROMPT_CHARS": "100",
    "BODY_TIMEOUT_SECONDS": "0.5",
    "CORS_ORIGINS": "https://desk.example",
}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without models, with keys and narrow limits."""
    keys = f"{KEYS[0]}, {KEYS[1]}"
    with serve(tmp_path_factory.mktemp("closed"), SIDECAR_API_KEYS=keys, **LIMITS) as running:
        yield running


def start_request(server: LiveServer, head: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head)
    return connection


def answer_of(connection: socket.socket) -> bytes:
    """The answer, up to the first line of its body."""
    received = b""
    with connection:
        while b"}" not in received and (data := connection.recv(1 << 16)):
            received += data
    return received


# Keys


@pytest.mark.parametrize(
    "path", ["/redoc", "/stream/audio", "/nothing", "/health/%2e%2e/docs", "/docsX"]
)
def test_every_other_path_needs_a_key(closed: LiveServer, path: str) -> None:
    assert closed.client.get(path).status_code == 401


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_the_documentation_needs_no_key(closed: LiveServer, path: str, slash: str) -> None:
    assert closed.client.get(path + slash).status_code == 200


# Without models, the server is alive and not ready.
@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/health/live", 200), ("/health/ready", 503)]
)
def test_probes_need_no_key(closed: LiveServer, path: str, status: int, slash: str) -> None:
    response = closed.client.get(path + slash)
    assert response.status_code == status
    assert "WWW-Authenticate" not in response.headers


@pytest.mark.parametrize(("needed", "status"), [("false", 200), ("true", 401)])
async def test_metrics_need_a_key_only_if_configured(needed: str, status: int) -> None:
    environ = {"ENABLE_METRICS": "true", "SIDECAR_API_KEYS": KEYS[0], "METRICS_NEED_KEY": needed}
    app = create_app(Settings.from_environ(environ))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/metrics", "/metrics/"):
            assert (await client.get(path)).status_code == status
            assert (await client.get(path, headers=BEARER)).status_code == 200


def test_a_refusal_does_not_wait_for_the_body(closed: LiveServer) -> None:
    head = b"POST /generate/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with start_request(closed, head) as connection:
        assert connection.recv(12) == b"HTTP/1.1 401"


def test_the_client_sends_the_key_of_the_environment(
    closed: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDECAR_API_KEY", KEYS[1])
    with LLMClient(closed.url) as client:
        assert client.speak("Filled.").startswith(b"RIFF")


def test_no_log_contains_a_key(closed: LiveServer) -> None:
    closed.client.get(f"/docs?key={KEYS[0]}", headers=BEARER)
    assert KEYS[0] not in closed.logged()


# Limits

LONG_TEXT = "Text is too long; MAX_PROMPT_CHARS takes 100 characters"
LONG_OBJECT = "Object is too long; MAX_PROMPT_CHARS takes 100 characters of JSON"


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("/generate/hermes/", {"prompt": "x" * 101}, "prompt", LONG_TEXT),
        ("/generate/phi3/", {"prompt": "x" * 101}, "prompt", LONG_TEXT),
        ("/propose_trade_adjustments/", {"prompt": "x" * 101}, "prompt", LONG_TEXT),
        ("/score/hermes/", {"proposal": {"a": 1}, "context": "x" * 101}, "context", LONG_TEXT),
        ("/score/hermes/", {"proposal": {"a": "x" * 101}}, "proposal", LONG_OBJECT),
        ("/speak", {"text": "x" * 101}, "text", LONG_TEXT),
    ],
)
def test_a_long_text_is_422_with_field_and_limit(
    closed: LiveServer, path: str, body: Any, field: str, message: str
) -> None:
    response = closed.client.post(path, json=body, headers=BEARER)
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert (entry["loc"], entry["msg"]) == (["body", field], message)
    assert "xxx" not in response.text


def test_requests_beyond_the_maximum_are_429(closed: LiveServer) -> None:
    def listen() -> Any:
        return httpx.stream("GET", f"{closed.url}/stream/audio", headers=BEARER, timeout=30)

    def speak() -> httpx.Response:
        return closed.client.post("/speak", json={"text": "Hi."}, headers=BEARER)

    with contextlib.ExitStack() as stack:
        for _ in range(2 * len(closed.sidecars)):
            assert stack.enter_context(listen()).status_code == 200
        response = speak()
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert "MAX_CONCURRENT_REQUESTS" in response.json()["detail"]
        assert closed.client.get("/health/live").status_code == 200
    closed.wait_until(lambda: speak().status_code == 200, 10)


def test_an_incomplete_body_is_408_and_the_server_still_answers(closed: LiveServer) -> None:
    head = (
        b"POST /speak HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"text":' % KEYS[0].encode()
    )
    with ThreadPoolExecutor(2) as pool:
        connections = [start_request(closed, head) for _ in range(2 * len(closed.sidecars))]
        answers = list(pool.map(answer_of, connections))
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.5 s" in answer
    assert closed.client.post("/speak", json={"text": "Hi."}, headers=BEARER).status_code == 200


# Headers


@pytest.mark.parametrize("path", ["/health", "/docs", "/nothing", "/openapi.json"])
@pytest.mark.parametrize("headers", [{}, BEARER])
def test_every_answer_has_security_headers(
    closed: LiveServer, path: str, headers: dict[str, str]
) -> None:
    sent = closed.client.get(path, headers=headers).headers
    assert sent["X-Content-Type-Options"] == "nosniff"
    assert sent["Referrer-Policy"] == "no-referrer"
    assert sent["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in sent["Content-Security-Policy"]
    scripts = "script-src 'self'" in sent["Content-Security-Policy"]
    assert scripts == (path == "/docs")


async def test_other_origins_are_allowed_only_if_configured(
    closed: LiveServer, tmp_path: Path
) -> None:
    asked = {
        "Origin": "https://desk.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = closed.client.options("/generate/", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://desk.example"
    assert "Access-Control-Allow-Credentials" not in preflight.headers
    answer = closed.client.get("/health/live", headers={"Origin": "https://desk.example"})
    assert "X-Grounded" in answer.headers["Access-Control-Expose-Headers"].split(", ")
    withdrawing = asked | {"Access-Control-Request-Method": "DELETE"}
    assert closed.client.options("/feedback/some-id", headers=withdrawing).status_code == 200
    other = closed.client.options("/generate/", headers=asked | {"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
    async with in_process(tmp_path) as client:
        assert (await client.options("/generate/", headers=asked)).status_code == 405
        answer = await client.get("/health", headers={"Origin": "https://desk.example"})
        assert answer.status_code == 200
        assert "Access-Control-Allow-Origin" not in answer.headers
