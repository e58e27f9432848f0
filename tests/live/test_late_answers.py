"""Requests that a model fails: finished results are kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.db import Store
from tests.live_server import LiveServer, serve
from tests.random_models import CONTEXT_LENGTH

PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81."}
LEAST = 96
"""The smallest `max_length` of a proposal, and the longest critique, in tokens."""
LONG_PROMPT = {"prompt": 60 * "Long ABC from 100, now 112.5. "}
"""Its prefill takes Phi-3 a while."""
CORRECTED = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "Nothing to do."}
SCORE = {"proposal": CORRECTED}
WALK = "/propose_trade_adjustments/"
QUEUE = 4
SEVERAL_TOKENS = 20
DEADLINE = 4
"""Seconds in which Phi-3 writes a proposal, however busy the machine is."""
PHASES = r"\d\.\d s in earlier model calls, \d\.\d s waiting, 0\.0 s in prefill, 0\.0 s in decode"


class Server:
    """A server in whose database a test can look, and whose models it can stop."""

    def __init__(self, live: LiveServer) -> None:
        self.live = live
        self.sidecars = len(live.sidecars)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.live.url}{path}", json=body, timeout=60)

    def wait_for_requests(self, name: str, count: int) -> None:
        self.live.wait_until(lambda: self.live.total("models", name, "requests") == count)

    def rows_written(self) -> int:
        return self.live.total("database", "rows_written")

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """A model's workers answer nothing meanwhile."""
        pids = self.live.workers(name)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def asking(self, path: str, body: dict[str, Any]) -> Iterator[None]:
        """A client that sends a request and disconnects without waiting for the answer."""
        host, port = self.live.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content))
            connection.sendall(content)
            yield

    def rows(self, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = self._ask(
            lambda store: store.transaction(transaction_id)
        )
        return found

    def runs(self, status: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask(
            lambda store: store.last("orchestrator_runs", 0, status=status)
        )
        return found

    def metric(self, name: str, **labels: str) -> float:
        return self.live.metrics().value(name, **labels)

    def _ask(self, query: Callable[[Store], Any]) -> Any:
        async def ask() -> Any:
            async with self.live.stored() as store:
                return await query(store)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def server(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a short deadline and a short queue."""
    folder = tmp_path_factory.mktemp("late")
    limits = {"REQUEST_TIMEOUT_SECONDS": str(DEADLINE), "QUEUE_LENGTH": str(QUEUE)}
    with serve(
        folder, PRELOAD_MODELS="true", ENABLE_METRICS="true", **limits, **random_models
    ) as live:
        live.wait_until_ready()
        yield Server(live)


@pytest.fixture(scope="module")
def late(server: Server) -> dict[str, httpx.Response]:
    """The answers to requests for whose whole time Hermes was stopped: one that had begun, three
    that had not, and a proposal request that met the full queue.

    Behind a proxy each sidecar gets one of each kind, and the answers are those of one of them.
    """

    def have_begun() -> bool:
        return all(
            health["models"]["hermes"]["completion_tokens_total"] >= count + SEVERAL_TOKENS
            for health, count in zip(server.live.healths(), before, strict=True)
        )

    asking: dict[str, Future[httpx.Response]] = {}
    with ThreadPoolExecutor(QUEUE * server.sidecars) as pool:

        def ask(name: str, path: str, body: dict[str, Any]) -> None:
            for _ in range(server.sidecars):
                asking[name] = pool.submit(server.post, path, body)

        before = [
            health["models"]["hermes"]["completion_tokens_total"]
            for health in server.live.healths()
        ]
        ask("text", "/generate/hermes/", PROMPT | {"max_length": 7900})
        # The first tokens may have no text yet: a character can take several.
        server.live.wait_until(have_begun)
        with server.stopped("hermes"):
            ask("walk", WALK, LONG_PROMPT)
            ask("unbegun", "/generate/hermes/", PROMPT)
            ask("score", "/score/hermes/", SCORE)
            server.wait_for_requests("hermes", QUEUE * server.sidecars)
            refused = server.post(WALK, PROMPT)
            answers = {name: future.result() for name, future in asking.items()}
    return {**answers, "refused": refused}


def partial_run(server: Server, answer: httpx.Response) -> dict[str, Any]:
    """The row of the failed run, stored beside its proposal and no score."""
    rows = server.rows(answer.json()["transaction_id"])
    (run,), (proposal,) = rows.pop("orchestrator_runs"), rows.pop("proposals")
    assert rows["hermes_scores"] == []
    assert run["status"] == "partial"
    assert run["input_query"] == proposal["prompt"]
    assert run["error_message"] == answer.json()["detail"]
    assert json.loads(run["final_output"]) == {
        "proposal": json.loads(proposal["proposal"]),
        "assessment": None,
        "score": None,
    }
    assert (proposal["assessment"], proposal["score"]) == ("", None)
    assert proposal["latencies"].pop("proposal") > 0
    assert proposal["latencies"] == {"assessment": None, "score": None}
    return run


def too_long_for_hermes(server: Server) -> dict[str, Any]:
    """A request that just fits into Phi-3's context; Hermes' prompt has the proposal as well."""

    def room(words: int) -> tuple[str, int]:
        """A prompt, and how many tokens its completion may have."""
        prompt = PROMPT["prompt"] + words * " up"
        body = {"prompt": prompt, "max_length": CONTEXT_LENGTH}
        refused = server.post("/generate/phi3/", body).json()["detail"]
        used, context = map(int, re.findall(r"\d+", refused.partition(": ")[2]))
        return prompt, context - used

    (_, most), (_, less) = room(0), room(100)
    prompt, left = room(100 * (most - LEAST) // (most - less))
    assert left >= LEAST
    return {"prompt": prompt, "max_length": left}


# The deadline


def test_a_late_assessment_is_504_and_the_proposal_is_stored(
    server: Server, late: dict[str, httpx.Response]
) -> None:
    answer = late["walk"]
    assert answer.status_code == 504
    assert set(answer.json()) == {"detail", "transaction_id"}
    assert int(answer.headers["Retry-After"]) >= 1
    assert "X-Stored" not in answer.headers
    detail = f"hermes did not answer within {DEADLINE} s: {PHASES}; try again later."
    assert re.fullmatch(detail, answer.json()["detail"])
    assert partial_run(server, answer)["input_query"] == LONG_PROMPT["prompt"]


def test_a_stored_partial_proposal_can_be_corrected(
    server: Server, late: dict[str, httpx.Response]
) -> None:
    feedback = {
        "transaction_id": late["refused"].json()["transaction_id"],
        "feedback_type": "correction",
        "feedback_content": "no reason to move",
        "corrected_proposal": CORRECTED,
    }
    message = server.post("/feedback/phi3/", feedback).json()["message"]
    assert message.endswith("is an example for the next ones.")


def test_free_text_at_the_deadline_is_returned_as_far_as_it_got(
    server: Server, late: dict[str, httpx.Response]
) -> None:
    answer = late["text"]
    assert answer.status_code == 200
    assert answer.headers["X-Finish-Reason"] == "deadline"
    assert answer.json()["generated_text"]
    assert 0 < int(answer.headers["X-Completion-Tokens"]) < 7900
    deadline = {"model": "hermes", "finish_reason": "deadline"}
    assert server.metric("sidecar_request_success_total", **deadline) == server.sidecars


def test_a_request_that_has_not_begun_at_the_deadline_is_504_and_stores_nothing(
    server: Server, late: dict[str, httpx.Response]
) -> None:
    for answer in (late["unbegun"], late["score"]):
        assert answer.status_code == 504
        assert set(answer.json()) == {"detail"}
        assert int(answer.headers["Retry-After"]) >= 1
    exceeded = {"model": "hermes", "error": "DeadlineExceeded"}
    assert server.metric("sidecar_request_errors_total", **exceeded) == 3 * server.sidecars


# Hermes fails otherwise


def test_a_proposal_that_hermes_has_no_place_for_is_stored(
    server: Server, late: dict[str, httpx.Response]
) -> None:
    answer = late["refused"]
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    run = partial_run(server, answer)
    assert "hermes queue is full" in run["error_message"]


def test_a_proposal_that_does_not_fit_into_hermes_is_stored(server: Server) -> None:
    answer = server.post(WALK, too_long_for_hermes(server))
    assert answer.status_code == 422
    run = partial_run(server, answer)
    assert "context of 8192" in run["error_message"]


def test_a_client_that_disconnects_during_the_assessment_leaves_the_proposal(
    server: Server,
) -> None:
    written, before = server.rows_written(), len(server.runs("partial"))
    with server.stopped("hermes"):
        with server.asking(WALK, PROMPT):
            server.wait_for_requests("hermes", 1)
        server.live.wait_until(lambda: server.rows_written() == written + 2)
    run, *others = server.runs("partial")
    assert len(others) == before
    reason = "The client disconnected, or the server ended, before Hermes had finished."
    assert run["error_message"] == reason
    assert set(json.loads(run["final_output"])["proposal"]) > {"ticker", "action"}
    (proposal,) = server.rows(run["run_id"])["proposals"]
    assert json.loads(proposal["proposal"]) == json.loads(run["final_output"])["proposal"]


@pytest.mark.own_process("sends a signal")
def test_a_shutdown_during_the_assessment_leaves_the_proposal(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with (
        serve(
            tmp_path, PRELOAD_MODELS="true", SHUTDOWN_GRACE_SECONDS="0.1", **random_models
        ) as live,
        ThreadPoolExecutor(1) as pool,
    ):
        live.wait_until_ready()
        server = Server(live)
        with server.stopped("hermes"):
            asking = pool.submit(server.post, WALK, PROMPT)
            server.wait_for_requests("hermes", 1)
            live.process.send_signal(signal.SIGTERM)
            assert asking.result(30).status_code == 503
        assert live.process.wait(30) == 0
    assert asyncio.run(proposals_of_partial_runs(tmp_path / "lancedb")) == [1]


async def proposals_of_partial_runs(database: Path) -> list[int]:
    store = await Store.open(database, create=False)
    try:
        runs = await store.last("orchestrator_runs", 0, status="partial")
        return [len((await store.transaction(run["run_id"]))["proposals"]) for run in runs]
    finally:
        await store.close()


# Refused


def test_a_refused_request_writes_no_row(server: Server) -> None:
    before = server.rows_written()
    invalid: list[dict[str, Any]] = [
        PROMPT | {"max_length": 10},
        PROMPT | {"max_length": CONTEXT_LENGTH},
        {"prompt": 3000 * "価"},
    ]
    assert [server.post(WALK, body).status_code for body in invalid] == [422, 422, 422]
    with server.stopped("phi3"), contextlib.ExitStack() as clients:
        for _ in range(QUEUE * server.sidecars):
            clients.enter_context(server.asking("/generate/phi3/", PROMPT))
        server.wait_for_requests("phi3", QUEUE * server.sidecars)
        answer = server.post(WALK, PROMPT)
    assert answer.status_code == 429
    assert set(answer.json()) == {"detail"}
    server.wait_for_requests("phi3", 0)
    # The row that is written next is the only one.
    assert server.post("/score/hermes/", SCORE).status_code == 200
    assert server.rows_written() == before + 1


# A database that takes no rows


@pytest.fixture(scope="module")
def unstorable(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose database cannot be, and which has answered one request of each kind."""
    folder = tmp_path_factory.mktemp("unstorable")
    (folder / "file").write_text("in the way")
    environ = random_models | {"LANCEDB_URI": str(folder / "file" / "db")}
    with serve(folder, PRELOAD_MODELS="true", ENABLE_METRICS="true", **environ) as live:
        for name in ("phi3", "hermes"):
            live.wait_until(partial(is_loaded, live, name))
        yield Server(live)


def is_loaded(live: LiveServer, name: str) -> bool:
    return all(health["models"][name]["state"] == "ready" for health in live.healths())


def lost(server: Server) -> dict[str, float]:
    tables = ("orchestrator_runs", "hermes_scores", "proposals")
    return {
        table: server.metric("sidecar_database_rows_lost_total", table=table) for table in tables
    }


def test_an_answer_says_that_its_rows_are_not_stored_and_they_are_counted(
    unstorable: Server,
) -> None:
    before = lost(unstorable)
    answer = unstorable.post(WALK, PROMPT)
    assert answer.status_code == 200
    assert answer.headers["X-Stored"] == "false"
    assert lost(unstorable) == {table: count + 1 for table, count in before.items()}


def test_a_score_says_that_it_is_not_stored(unstorable: Server) -> None:
    before = lost(unstorable)
    answer = unstorable.post("/score/hermes/", SCORE)
    assert answer.status_code == 200
    assert answer.headers["X-Stored"] == "false"
    assert lost(unstorable) == before | {"hermes_scores": before["hermes_scores"] + 1}


def test_an_error_names_no_transaction_that_is_not_stored(unstorable: Server) -> None:
    answer = unstorable.post(WALK, too_long_for_hermes(unstorable))
    assert answer.status_code == 422
    assert set(answer.json()) == {"detail"}
    assert answer.headers["X-Stored"] == "false"


def test_what_stores_nothing_says_nothing_of_it(unstorable: Server) -> None:
    before = lost(unstorable)
    for path, body in (("/generate/phi3/", PROMPT), (WALK, PROMPT | {"max_length": 10})):
        assert "X-Stored" not in unstorable.post(path, body).headers
    assert lost(unstorable) == before
