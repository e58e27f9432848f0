"""Errors as a real server reports them to a local Sentry."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.errors import SettingsError
from llm_sidecar.settings import Settings
from tests.live_server import LiveServer, free_port, serve
from tests.receiver import Receiver

pytestmark = pytest.mark.own_process("reads what the process sends to Sentry")

SECRET = "ZXQSECRET"
HEADERS = {
    "X-Request-ID": "request-of-the-test",
    "Authorization": f"Bearer {SECRET}",
    "X-API-Key": SECRET,
    "User-Agent": f"{SECRET}/1.0",
    "Cookie": f"session={SECRET}",
    # uvicorn closes the connection after an unexpected error.
    "Connection": "close",
}
PATIENT = {"MODEL_LOAD_WAIT_SECONDS": "60"}
SCORED = {"proposal": {"ticker": "ABC"}}


def dsn(port: int) -> str:
    return f"http://{SECRET}-key@127.0.0.1:{port}/42"


def items(receiver: Receiver, kind: str) -> list[dict[str, Any]]:
    """The payloads of one kind in the envelopes (https://develop.sentry.dev/sdk/envelopes/)."""
    found = []
    for request in list(receiver.requests):
        assert request.path == "/api/42/envelope/"
        lines = request.body.splitlines()
        for header, payload in zip(lines[1::2], lines[2::2], strict=True):
            if json.loads(header)["type"] == kind:
                found.append(json.loads(payload))
    return found


@pytest.fixture(scope="module")
def sentry() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="module")
def reporting(
    sentry: Receiver, random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    environ = {
        **random_models,
        **PATIENT,
        "SENTRY_DSN": dsn(sentry.port),
        "SENTRY_ENV": "under-test",
        "SENTRY_TRACES_SAMPLE_RATE": "1",
    }
    folder = tmp_path_factory.mktemp("reporting")
    with serve(folder, app="tests.failing_app:app", **environ) as running:
        running.wait_until_ready()
        yield running


def fail(server: LiveServer) -> None:
    answer = server.client.post(
        f"/fail/{SECRET}?key={SECRET}", json={"prompt": SECRET}, headers=HEADERS
    )
    assert answer.status_code == 500
    assert SECRET not in answer.text


def test_an_unexpected_error_is_one_event_with_its_request_and_model(
    reporting: LiveServer, sentry: Receiver
) -> None:
    fail(reporting)
    (event,) = reporting.wait_until(lambda: items(sentry, "event"))
    assert event["tags"] == {"request_id": "request-of-the-test", "model": "hermes"}
    assert event["environment"] == "under-test"
    assert event["release"].startswith("osiris-llm-sidecar@")
    (error,) = event["exception"]["values"]
    assert error["type"] == "RuntimeError"
    assert error["stacktrace"]["frames"][-1]["function"] == "fail"
    sentry.requests.clear()


def test_an_expected_error_is_not_an_event_and_a_route_is_a_transaction(
    reporting: LiveServer, sentry: Receiver
) -> None:
    sentry.requests.clear()
    too_short = {"prompt": SECRET, "max_length": 1}
    assert reporting.client.post("/generate/phi3/", json=too_short).status_code == 422
    assert reporting.client.get("/health").is_success
    assert reporting.client.post("/score/hermes/", json=SCORED).is_success

    def names() -> list[str]:
        return [transaction["transaction"] for transaction in items(sentry, "transaction")]

    reporting.wait_until(lambda: "POST /score/hermes/" in names())
    assert sorted(names()) == [
        "POST /generate/phi3/",
        "POST /score/hermes/",
    ]
    (scored,) = [
        transaction
        for transaction in items(sentry, "transaction")
        if transaction["transaction"] == "POST /score/hermes/"
    ]
    assert [span["description"] for span in scored["spans"]] == ["score_choices hermes"]
    assert not items(sentry, "event")


def test_the_death_of_an_idle_worker_is_one_event(reporting: LiveServer, sentry: Receiver) -> None:
    sentry.requests.clear()
    assert reporting.client.post("/score/hermes/", json=SCORED).is_success
    os.kill(reporting.worker("hermes"), signal.SIGKILL)
    (event,) = reporting.wait_until(lambda: items(sentry, "event"))
    assert event["message"] == "The hermes worker ended (signal SIGKILL)"
    assert event["tags"] == {"model": "hermes"}


def test_the_death_of_a_busy_worker_names_the_request(
    reporting: LiveServer, sentry: Receiver
) -> None:
    sentry.requests.clear()
    assert reporting.client.post("/score/hermes/", json=SCORED).is_success
    long = {"prompt": SECRET, "max_length": 7900}
    headers = {"X-Request-ID": "cut-short"}

    def tokens() -> int:
        hermes = reporting.client.get("/health").json()["models"]["hermes"]
        return int(hermes["completion_tokens_total"])

    before = tokens()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post, f"{reporting.url}/generate/hermes/", json=long, headers=headers, timeout=60
        )
        # If a worker dies before it has started a request, the next worker serves the request.
        reporting.wait_until(lambda: tokens() > before)
        os.kill(reporting.worker("hermes"), signal.SIGKILL)
        assert answer.result().status_code == 503
    (event,) = reporting.wait_until(lambda: items(sentry, "event"))
    assert event["message"] == "The hermes worker ended (signal SIGKILL)"
    assert event["tags"] == {"model": "hermes", "request_id": "cut-short"}


def test_no_event_contains_text_of_a_request(reporting: LiveServer, sentry: Receiver) -> None:
    sentry.requests.clear()
    fail(reporting)
    reporting.wait_until(lambda: items(sentry, "event") and items(sentry, "transaction"))
    for request in sentry.requests:
        assert SECRET.encode() not in request.body.replace(f"{SECRET}-key".encode(), b"")
        for word in (b"Bearer", b"session=", b"User-Agent", b"vars", b"breadcrumbs", b"query"):
            assert word not in request.body


def test_an_unreachable_sentry_does_not_delay_requests(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    """One that hangs and one that is down, at the same time."""
    with Receiver(hanging=True) as hanging, contextlib.ExitStack() as stack:
        servers = []
        for name, port in (("hanging", hanging.port), ("down", free_port())):
            (tmp_path / name).mkdir()
            environ = {**random_models, **PATIENT, "SENTRY_DSN": dsn(port)}
            started = serve(tmp_path / name, app="tests.failing_app:app", **environ)
            servers.append(stack.enter_context(started))
        for server in servers:
            server.wait_until_ready()
            assert server.client.post("/score/hermes/", json=SCORED).is_success
            fail(server)
        servers[0].wait_until(lambda: hanging.requests)
        for server in servers:
            assert server.client.post("/score/hermes/", json=SCORED).is_success
            began = time.monotonic()
            server.stop()
            # This includes the end of the workers and of the database.
            assert time.monotonic() - began < 15
    for server in servers:
        said = server.log.read_text()
        assert "sentry" not in said.lower().replace("telemetry/sentry.py", "")


@pytest.mark.parametrize(
    "value", ["x", "http://host/1", "https://hidden@host/", "ftp://hidden@h/1"]
)
def test_an_invalid_dsn_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(SettingsError, match=r"SENTRY_DSN=\*\*\* is not valid") as caught:
        Settings.from_environ({"SENTRY_DSN": value})
    assert "hidden" not in caught.value.detail
