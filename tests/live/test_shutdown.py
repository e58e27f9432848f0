"""Shutdown: in order, within time limits, and without losing an answer."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.db import Store
from osiris.shutdown import Shutdown
from tests.live_server import ROOT, LiveServer, free_port, is_running, serve

pytestmark = pytest.mark.own_process("sends a signal")

PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81."}
LONG = PROMPT | {"max_length": 7900}
CLIENTS = 16


def load_both(server: LiveServer) -> list[int]:
    assert server.client.post("/propose_trade_adjustments", json=PROMPT).status_code == 200
    return [server.worker("phi3"), server.worker("hermes")]


def client_work(number: int, turn: int) -> tuple[str, dict[str, Any]]:
    """A request of a client: a quick durable one, or one that takes longer."""
    if number % 2:
        transaction = f"{number}-{turn}"
        return "/feedback/phi3/", {
            "transaction_id": transaction,
            "feedback_type": "rating",
            "feedback_content": "good",
        }
    return "/generate/hermes/", PROMPT | {"max_length": 60}


class Load:
    """Clients that send requests without a pause until they are refused, and their answers."""

    def __init__(self, server: LiveServer) -> None:
        self._url = server.url
        self.answered: list[tuple[str, dict[str, Any], httpx.Response]] = []
        self.cut: list[str] = []
        self.turned_away = 0

    def ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for turn in range(10_000):
                path, body = client_work(number, turn)
                try:
                    response = client.post(path, json=body)
                except httpx.ConnectError:
                    self.turned_away += 1
                    return
                except httpx.TransportError as error:
                    self.cut.append(f"{path}: {error!r}")
                    return
                self.answered.append((path, body, response))
                if response.status_code == 503:
                    return


def readiness(server: LiveServer, seen: list[str], stop: threading.Event) -> None:
    """The states that a load balancer sees, each change once."""
    while not stop.is_set():
        try:
            now = httpx.get(f"{server.url}/health/ready", timeout=10).json()["status"]
        except httpx.TransportError:
            now = "gone"
        if seen[-1:] != [now]:
            seen.append(now)
        if now == "gone":
            return


async def test_sigterm_under_load_answers_every_request_and_loses_nothing(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with serve(tmp_path, SHUTDOWN_DRAIN_SECONDS="0.5", **random_models) as server:
        workers = load_both(server)
        load, seen, stop = Load(server), list[str](), threading.Event()
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            try:
                watching = pool.submit(readiness, server, seen, stop)
                asking = [pool.submit(load.ask, number) for number in range(CLIENTS)]
                server.wait_until(lambda: seen and len(load.answered) > 2 * CLIENTS)
                server.process.send_signal(signal.SIGTERM)
                status = server.process.wait(30)
                watching.result(10)
            finally:
                stop.set()
            for task in asking:
                task.result(30)
        log = server.log.read_text()
    assert status == 0
    assert "draining: new work is refused, " in log
    assert "drained: every request is answered" in log
    assert seen == ["ok", "draining", "gone"]
    assert load.cut == []
    assert {response.status_code for _, _, response in load.answered} == {200, 503}
    refused = [answer for _, _, answer in load.answered if answer.status_code == 503]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    # A client whose connection closes with its answer notices the end at its next request.
    assert len(refused) + load.turned_away == CLIENTS
    assert not any(map(is_running, workers))
    assert "Traceback" not in log
    await assert_stored(tmp_path, load)


async def assert_stored(folder: Path, load: Load) -> None:
    acknowledged = [
        body["transaction_id"]
        for path, body, response in load.answered
        if path.startswith("/feedback") and response.status_code == 200
    ]
    store = await Store.open(folder / "lancedb")
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert acknowledged
    assert set(acknowledged) <= {row["transaction_id"] for row in rows}


@pytest.fixture
def busy(random_models: dict[str, str], tmp_path: Path) -> Iterator[LiveServer]:
    """A server with a grace period longer than the test."""
    with serve(tmp_path, SHUTDOWN_GRACE_SECONDS="300", **random_models) as server:
        load_both(server)
        yield server


def admitted(server: LiveServer) -> int:
    """Number of running and waiting requests of Hermes."""
    return int(server.client.get("/health").json()["models"]["hermes"]["requests"])


def is_draining(server: LiveServer) -> bool:
    return bool(server.client.get("/health/ready").json()["status"] == "draining")


def test_a_second_signal_stops_a_server_with_a_long_generation(busy: LiveServer) -> None:
    workers = [busy.worker("phi3"), busy.worker("hermes")]
    with ThreadPoolExecutor(4) as pool:
        asking = [
            pool.submit(httpx.post, f"{busy.url}/generate/hermes/", json=LONG, timeout=60)
            for _ in range(4)
        ]
        busy.wait_until(lambda: admitted(busy) == 4)
        busy.process.send_signal(signal.SIGTERM)
        busy.wait_until(lambda: is_draining(busy))
        began = time.monotonic()
        busy.process.send_signal(signal.SIGTERM)
        assert busy.process.wait(30) == 0
        # A few seconds; more on a busy machine, but far from 300.
        assert time.monotonic() - began < 25
        answers = [task.result(10) for task in asking]
    assert 503 in {answer.status_code for answer in answers} <= {200, 503}
    assert not any(map(is_running, workers))
    assert "Traceback" not in busy.log.read_text()


def test_a_request_that_outlasts_the_grace_period_is_503(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with serve(tmp_path, SHUTDOWN_GRACE_SECONDS="0.2", **random_models) as server:
        load_both(server)
        with ThreadPoolExecutor(4) as pool:
            asking = [
                pool.submit(httpx.post, f"{server.url}/generate/hermes/", json=LONG, timeout=60)
                for _ in range(4)
            ]
            server.wait_until(lambda: admitted(server) == 4)
            assert server.stop(signal.SIGHUP) == 0
            answers = [task.result(10) for task in asking]
    cut = [answer for answer in answers if answer.status_code == 503]
    assert cut
    assert all("shutting down" in answer.json()["detail"] for answer in cut)


def test_a_draining_server_answers_probes_and_refuses_new_work(busy: LiveServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        body = PROMPT | {"max_length": 3000}
        running = pool.submit(httpx.post, f"{busy.url}/generate/hermes/", json=body, timeout=60)
        busy.wait_until(lambda: admitted(busy))
        busy.process.send_signal(signal.SIGTERM)
        busy.wait_until(lambda: is_draining(busy))
        assert busy.client.get("/health/live").status_code == 200
        assert busy.client.get("/health").status_code == 200
        refused = busy.client.post("/speak", json={"text": "x" * 100_000})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["Connection"] == "close"
        assert running.result(60).status_code == 200
        assert busy.process.wait(30) == 0


def test_a_client_that_reads_slowly_gets_its_whole_answer(tmp_path: Path) -> None:
    text = json.dumps({"text": "Take the profit. " * 290}).encode()
    with serve(tmp_path) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(
            b"POST /speak HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(text), text)
        )
        received = client.recv(1 << 12)
        server.process.send_signal(signal.SIGTERM)
        while data := client.recv(1 << 18):
            received += data
            time.sleep(0.01)  # the client's, which takes longer than a second for all of it
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        assert len(body) == int(length[1]) > 8 << 20
        assert server.process.wait(30) == 0


def test_a_signal_during_the_start_stops_the_server(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(ROOT), "REDIS_URL": "memory://", "LANCEDB_URI": str(tmp_path)}
    command = [sys.executable, "-m", "uvicorn", "osiris.server:app", "--port", str(free_port())]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if b"Waiting for application startup" in line)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert b"Traceback" not in rest


async def test_no_signal_handler_is_installed_without_uvicorn() -> None:
    before = signal.getsignal(signal.SIGTERM)
    shutdown = Shutdown(grace=1, drain=0)
    shutdown.install()
    assert signal.getsignal(signal.SIGTERM) is before
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    await shutdown.close(close())
    assert closed.is_set()
    assert not shutdown.draining


def test_uvicorn_in_a_thread_serves_and_stops(tmp_path: Path) -> None:
    script = """
import sys, threading, time
import httpx, uvicorn
from llm_sidecar.settings import Settings
from osiris.server import create_app

app = create_app(Settings(events={"url": "memory://"}, database={"uri": sys.argv[1]}))
server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[2])))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
assert httpx.get(f"http://127.0.0.1:{sys.argv[2]}/health/live").status_code == 200
server.should_exit = True
thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "db"), str(free_port())],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
