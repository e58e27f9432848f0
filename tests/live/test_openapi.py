"""The server compared with its OpenAPI document, and malformed requests."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import TARGET, LiveServer, serve
from tests.schemathesis_run import find_faults

KEY = "a-key-of-the-tests-0123"


@pytest.fixture(scope="module")
def strict(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with loaded models, a key and short deadlines."""
    limits = {"REQUEST_TIMEOUT_SECONDS": "0.5", "BODY_TIMEOUT_SECONDS": "1"}
    with serve(
        tmp_path_factory.mktemp("strict"),
        PRELOAD_MODELS="true",
        SIDECAR_API_KEYS=KEY,
        ENABLE_METRICS="true",
        ENABLE_PROFILING="true",
        **limits,
        **random_models,
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def document(strict: LiveServer) -> dict[str, Any]:
    made: dict[str, Any] = strict.client.get("/openapi.json").json()
    return made


def test_the_document_describes_the_api_keys(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert schemes["apiKey"]["name"] == "X-API-Key"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path.startswith(("/health", "/metrics"))
            assert ("401" in operation["responses"]) != is_open, path
            assert operation.get("security") == (None if is_open else [{n: []} for n in schemes])


def test_the_document_has_the_configured_limit(document: dict[str, Any]) -> None:
    prompt = document["components"]["schemas"]["PromptRequest"]["properties"]["prompt"]
    assert prompt["maxLength"] == 32_768


def test_every_answer_is_documented_and_invalid_input_is_refused(
    strict: LiveServer, tmp_path: Path
) -> None:
    """`tests/long` sends random requests too."""
    faults = find_faults(strict.url, KEY, tmp_path)
    assert not faults, faults
    assert strict.client.get("/health/ready").status_code == 200
    assert "Traceback" not in strict.logged()


POST = b"POST /speak HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n" % KEY.encode()
MALFORMED = {
    "no request": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "a bad version": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "a bad header": b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
    "a bad length": POST + b"Content-Length: -5\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": POST
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a huge body": POST + b"Content-Length: 99999999999\r\n\r\n{",
    "a huge header": b"GET /health HTTP/1.1\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "a huge path": b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a body": POST + b'Content-Length: 100\r\n\r\n{"text"',
    "half a chunk": POST + b'Transfer-Encoding: chunked\r\n\r\n64\r\n{"text"',
    "a websocket": b"GET /stream/audio HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "an odd path": b"GET /%ff%00%2e%2e/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}
STATUSES = {
    "no request": 400,
    "no version": 400,
    "a bad version": 400,
    "a bad header": 400,
    "a bad length": 400,
    "two lengths": 400,
    "length and chunks": 400,
    "a bad chunk": 400,
    "a huge body": 413,
    "a huge header": 431,
    "a huge path": 431,
    "half a body": 408,
    "half a chunk": 408,
    "a websocket": 401,
    "an odd path": 401,
}
OF_THE_PROXY = {
    # It repairs these two.
    "a bad version": 200,
    "length and chunks": 415,
    "a huge header": 400,
    "a huge path": 400,
    "a websocket": 400,
}
"""The statuses that differ where haproxy reads the requests first."""
OF_RAY = {
    "no version": 200,
    # It has no limit.
    "a huge header": 200,
    "a huge path": 400,
    "a websocket": 400,
}
"""Those that differ where the proxy of Ray Serve does."""
STATUSES |= {"one": {}, "two": OF_THE_PROXY, "ray": OF_RAY}[TARGET]


def is_whole(answer: bytes) -> bool:
    """Whether a response declares its length and is complete."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_requests_leave_the_server_serving(strict: LiveServer, kind: str) -> None:
    host, port = strict.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(MALFORMED[kind])
        while not is_whole(answer) and (data := connection.recv(1 << 16)):
            answer += data
    assert int(answer.split(b" ")[1]) == STATUSES[kind], answer
    # The error of a proxy is text.
    if TARGET == "one":
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    assert b"Traceback" not in answer
    assert strict.client.get("/health/live").status_code == 200


def test_slow_requests_leave_the_server_serving(strict: LiveServer) -> None:
    host, port = strict.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /speak HTTP/1.1\r\nHost: x\r\nX-")
        speech = strict.client.post("/speak", json={"text": "Hi."}, headers={"X-API-Key": KEY})
        assert speech.status_code == 200
    finally:
        for connection in slow:
            connection.close()
