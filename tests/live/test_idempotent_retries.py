"""Requests that are sent again with their `Idempotency-Key`, to servers that share a database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from llm_sidecar.db import Store
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, require_redis

PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81."}
PROPOSE = "/propose_trade_adjustments/"
TABLES = ("orchestrator_runs", "proposals", "hermes_scores")


class Server:
    """A server whose Hermes a test can stop.

    Attributes:
        live: the server.
    """

    def __init__(self, live: LiveServer) -> None:
        self.live = live

    def propose(self, key: str) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return httpx.post(f"{self.live.url}{PROPOSE}", json=PROMPT, headers=headers, timeout=60)

    @contextlib.contextmanager
    def proposing(self, key: str) -> Iterator[None]:
        """A client that sends the request and disconnects without waiting for the answer."""
        host, port = self.live.url.removeprefix("http://").split(":")
        body = json.dumps(PROMPT, separators=(",", ":")).encode()
        head = (
            f"POST {PROPOSE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            yield

    @contextlib.contextmanager
    def hermes_stopped(self) -> Iterator[list[int]]:
        """Stops Hermes' workers for the duration of the block; yields their process ids."""
        pids = self.live.workers("hermes")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def wait_for_hermes(self) -> None:
        """Returns when a request waits for Hermes."""
        self.live.wait_until(lambda: self.live.total("models", "hermes", "requests") == 1)

    def tokens(self) -> int:
        """The tokens of all proposals."""
        return int(self.live.metrics().value("sidecar_generation_tokens_total", model="phi3"))


class Shared:
    """What the servers share.

    Attributes:
        environ: their configuration.
    """

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.environ = environ | {"ENABLE_METRICS": "true", "PRELOAD_MODELS": "true"}
        self._folder = folder

    @contextlib.contextmanager
    def server(self) -> Iterator[Server]:
        with serve(self._folder, **self.environ) as live:
            live.wait_until_ready()
            live.wait_until_database_is_open()
            yield Server(live)

    def check_one_of_each(self, server: Server, answer: httpx.Response) -> None:
        """Asserts that the run has one row in each table and one pair of events."""
        name = answer.json()["transaction_id"]

        async def ask() -> dict[str, list[dict[str, Any]]]:
            store = await Store.open(server.live.database, create=False)
            try:
                return await store.transaction(name)
            finally:
                await store.close()

        # The rows of a sidecar on another machine are there when it has moved them.
        server.live.wait_until(lambda: asyncio.run(ask())["hermes_scores"], interval=0.5)
        rows = asyncio.run(ask())
        assert {table: len(rows[table]) for table in TABLES} == dict.fromkeys(TABLES, 1)
        assert rows["orchestrator_runs"][0]["status"] == "success"
        created, assessed = "phi3.proposal.created", "phi3.proposal.assessed"
        # A relay notices within a second that it has to send the events of another process.
        server.live.wait_until(lambda: assessed in self._events(name))
        assert self._events(name) == [created, assessed]

    def _events(self, transaction_id: str) -> list[str]:
        """The types of the run's events in the stream."""
        with redis.Redis.from_url(self.environ["REDIS_URL"], decode_responses=True) as client:
            entries = [fields for _, fields in client.xrange("osiris.events")]
        return [fields["type"] for fields in entries if transaction_id in fields["data"]]


@pytest.fixture(scope="module")
def shared(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    require_redis()
    with RedisServer() as running:
        folder = tmp_path_factory.mktemp("retries")
        yield Shared(folder, {"REDIS_URL": running.url} | random_models)


@pytest.fixture(scope="module")
def server(shared: Shared) -> Iterator[Server]:
    with shared.server() as running:
        yield running


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


def test_two_requests_at_once_are_one_generation(server: Server, shared: Shared, key: str) -> None:
    before = server.tokens()
    with ThreadPoolExecutor(2) as pool:
        with server.hermes_stopped():
            both = [pool.submit(server.propose, key) for _ in range(2)]
            server.wait_for_hermes()
        first, second = (one.result() for one in both)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.content == second.content
    replayed = [one.headers.get("Idempotent-Replayed") for one in (first, second)]
    assert sorted(replayed, key=str) == [None, "true"]
    assert server.tokens() - before == int(first.headers["X-Completion-Tokens"])
    shared.check_one_of_each(server, first)


def test_a_retry_after_the_client_has_disconnected_goes_on_with_the_assessment(
    server: Server, shared: Shared, key: str
) -> None:
    before = server.tokens()
    with server.hermes_stopped(), server.proposing(key):
        server.wait_for_hermes()
    answer = server.propose(key)
    assert answer.status_code == 200
    assert server.tokens() - before == int(answer.headers["X-Completion-Tokens"])
    shared.check_one_of_each(server, answer)


@pytest.mark.own_process("starts a second server on the journal of the first, and kills it")
def test_two_servers_generate_once_and_one_goes_on_where_the_other_was_killed(
    server: Server, shared: Shared, key: str
) -> None:
    with shared.server() as other, ThreadPoolExecutor(2) as pool:
        before = server.tokens() + other.tokens()
        both = [pool.submit(one.propose, key) for one in (server, other)]
        first, second = (one.result() for one in both)
        assert first.content == second.content
        generated = server.tokens() + other.tokens() - before
        assert generated == int(first.headers["X-Completion-Tokens"])
        shared.check_one_of_each(server, first)

        before, key = server.tokens(), str(uuid.uuid4())
        with other.hermes_stopped() as hermes:
            killed = pool.submit(other.propose, key)
            other.wait_for_hermes()
            retried = pool.submit(server.propose, key)
            other.live.process.kill()
            for pid in hermes:
                os.kill(pid, signal.SIGKILL)
        assert isinstance(killed.exception(), httpx.TransportError)
        answer = retried.result()
    assert answer.status_code == 200
    # The other server had generated it.
    assert server.tokens() == before
    again = server.propose(key)
    assert (again.content, again.headers["Idempotent-Replayed"]) == (answer.content, "true")
    assert server.tokens() == before
    shared.check_one_of_each(server, answer)
