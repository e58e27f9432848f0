"""Log lines: their fields, and what they never contain."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.logs import JsonFormatter, TextFormatter, log_context, log_unhandled
from tests.live_server import LiveServer, serve

pytestmark = pytest.mark.own_process("reads the log")


def record(message: str, *args: object, **attributes: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "osiris.x", "levelname": "INFO", "msg": message})
    made.args = args
    made.created = 1_700_000_000.25
    vars(made).update(attributes)
    return made


@pytest.fixture
def in_a_request() -> Iterator[None]:
    token = log_context.set({"request_id": "order-77", "trace_id": "abc"})
    yield
    log_context.reset(token)


@pytest.mark.usefixtures("in_a_request")
def test_a_json_line_has_time_level_logger_message_context_and_fields() -> None:
    line = json.loads(JsonFormatter().format(record("%d\nrows", 3, rows=3, path=Path("/x"))))
    assert line == {
        "timestamp": "2023-11-14T22:13:20.250+00:00",
        "level": "INFO",
        "logger": "osiris.x",
        "message": "3\nrows",
        "request_id": "order-77",
        "trace_id": "abc",
        "rows": 3,
        "path": "/x",
    }


def test_a_field_cannot_replace_a_standard_field() -> None:
    line = json.loads(JsonFormatter().format(record("m", level="none", timestamp="never")))
    assert line["level"] == "INFO"
    assert line["timestamp"].startswith("2023")


def fail() -> None:
    raise ZeroDivisionError("a prompt")


def fail_after_another() -> None:
    try:
        fail()
    except ZeroDivisionError as error:
        raise ExceptionGroup("a prompt", [KeyError("a prompt"), OSError(28, "full")]) from error


def test_an_exception_has_type_and_stack_and_no_message() -> None:
    try:
        fail()
    except ZeroDivisionError:
        text = JsonFormatter().format(record("failed", exc_info=sys.exc_info()))
    exception = json.loads(text)["exception"]
    assert exception["type"] == "ZeroDivisionError"
    assert exception["stack"].splitlines()[-3:] == [
        f'  File "{__file__}", line {fail.__code__.co_firstlineno + 1}, in fail',
        '    raise ZeroDivisionError("a prompt")',
        "ZeroDivisionError",
    ]
    assert "\n" not in text


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_the_cause_of_an_exception_has_no_message_either(formatter: logging.Formatter) -> None:
    try:
        fail_after_another()
    except ExceptionGroup:
        text = formatter.format(record("failed", exc_info=sys.exc_info()))
    # Lines of source code may be logged.
    said = text.replace('"a prompt"', "").replace('\\"a prompt\\"', "")
    assert "a prompt" not in said
    for name in ("ExceptionGroup", "ZeroDivisionError", "KeyError", "OSError: full"):
        assert name in said


async def test_an_unretrieved_error_is_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError(" ".join(("a", "prompt")))

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_unhandled)
    try:
        task = asyncio.create_task(broken())
        await asyncio.wait([task])
        del task
        gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert "never retrieved" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "a prompt" not in caplog.text


@pytest.mark.usefixtures("in_a_request")
def test_a_text_line_ends_with_the_request_id() -> None:
    assert TextFormatter().format(record("done")).endswith(" INFO osiris.x: done [order-77]")


# A running server


def lines(server: LiveServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def of_requests(server: LiveServer) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line["logger"] == "osiris.access"]


BROKEN = """
from osiris.server import app

@app.get("/broken")
async def broken() -> None:
    raise ZeroDivisionError
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """A server that has answered requests of all kinds, and has stopped."""
    folder = tmp_path_factory.mktemp("logs")
    (folder / "broken.py").write_text(BROKEN)
    with serve(folder, "--app-dir", str(folder), app="broken:app") as server:
        server.wait_until_database_is_open()
        ask = server.client
        ask.post("/speak?why=hidden", json={"text": "hidden"}, headers={"X-Request-ID": "one"})
        ask.post("/speak/", json={"hidden": 1}, headers={"X-Request-ID": "two"})
        ask.get("/hidden", headers={"X-Request-ID": "three"})
        ask.delete("/feedback/hidden", headers={"X-Request-ID": "four"})
        ask.get("/health")
        ask.get("/health/ready")
        ask.get("/metrics")
        answer = ask.get("/broken", headers={"X-Request-ID": "seven"})
        assert answer.status_code == 500
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "ZeroDivisionError" not in answer.text
        assert server.stop() == 0
    return server


def test_a_server_logs_json_with_one_line_a_request(stopped: LiveServer) -> None:
    seen = of_requests(stopped)
    loggers = {line["logger"] for line in lines(stopped)}
    shown = [(x["request_id"], x["method"], x["route"], x["status"]) for x in seen]
    assert shown == [
        ("one", "POST", "/speak", 200),
        ("two", "POST", "/speak", 422),
        ("three", "GET", "unmatched", 404),
        ("four", "DELETE", "/feedback/{feedback_id}", 404),
        ("seven", "GET", "/broken", 500),
    ]
    assert all(line["duration_ms"] > 0 for line in seen)
    assert "uvicorn.error" in loggers
    assert "uvicorn.access" not in loggers
    assert "hidden" not in stopped.log.read_text()


def test_an_unexpected_error_is_logged_with_the_request_id(stopped: LiveServer) -> None:
    errors = [line for line in lines(stopped) if line["level"] == "ERROR"]
    assert [(e["request_id"], e["exception"]["type"]) for e in errors] == [
        ("seven", "ZeroDivisionError")
    ]


def test_a_line_about_a_connection_has_no_id_of_an_earlier_request(tmp_path: Path) -> None:
    # With asyncio's loop, a paused connection resumes in the context of the request that has read
    # its body.
    with serve(tmp_path, "--loop", "asyncio") as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = b" " * 900_000
        head = (
            b"POST /speak HTTP/1.1\r\nHost: x\r\nX-Request-ID: one\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head + body)
            assert connection.recv(12) == b"HTTP/1.1 422"
            server.wait_until(lambda: of_requests(server))
            connection.sendall(b"no request\r\n\r\n")
            server.wait_until(lambda: "Invalid HTTP request" in server.log.read_text())
        shown = {line["message"]: line.get("request_id") for line in lines(server)}
        (access,) = of_requests(server)
    assert access["request_id"] == "one"
    assert shown["Invalid HTTP request received."] is None


def test_the_text_format_works_and_no_access_log_is_respected(tmp_path: Path) -> None:
    with serve(tmp_path, "--no-access-log", LOG_FORMAT="text") as server:
        server.client.post("/speak", json={"text": "Hi."})
        assert server.stop() == 0
        log = server.log.read_text()
    assert "INFO uvicorn.error: Application startup complete." in log
    assert "osiris.access" not in log
    assert "{" not in log
