"""The server as a process: its start, what it imports, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from llm_sidecar.db import Store
from llm_sidecar.event_bus import EventBus
from llm_sidecar.grounding import ungrounded_fields
from tests.live_server import ROOT, LiveServer, free_port, is_running, serve

PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81."}
LONG = PROMPT | {"max_length": 7900}


def load_both(server: LiveServer) -> list[int]:
    """Makes the server load its models; returns their processes."""
    assert server.client.post("/propose_trade_adjustments", json=PROMPT).status_code == 200
    return [server.worker("phi3"), server.worker("hermes")]


def wait_until_gone(server: LiveServer, pids: list[int], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < until, server.log.read_text()
        time.sleep(0.02)


@pytest.mark.own_process("starts the app in a process of its own")
def test_the_api_process_imports_no_model_runtime(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    script = """
import asyncio, json, sys
import httpx
from llm_sidecar.settings import Settings
from osiris.server import create_app

async def main():
    app = create_app(Settings.from_environ())
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            client.timeout = 60
            prompt = {"prompt": "Long ABC"}
            for path in ("/generate/phi3", "/generate/hermes", "/propose_trade_adjustments"):
                assert (await client.post(path, json=prompt)).status_code == 200
            assert (await client.post("/score/hermes", json={"proposal": {"a": 1}})).is_success
            assert (await client.get("/health")).is_success

asyncio.run(main())
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    environ = random_models | {"REDIS_URL": "memory://", "LANCEDB_URI": str(tmp_path / "db")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "lancedb" in loaded
    assert not loaded & {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "llguidance"}


@pytest.mark.own_process("starts the app in a process of its own")
def test_importing_the_server_reads_no_environment() -> None:
    command = [sys.executable, "-c", "import osiris.server"]
    environ = {"QUEUE_LENGTH": "bad", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environ, check=False).returncode == 0


@pytest.mark.own_process("starts the app in a process of its own")
@pytest.mark.parametrize(
    ("command", "environ", "line"),
    [
        (
            ["osiris"],
            {"QUEUE_LENGTH": "many"},
            "QUEUE_LENGTH='many' is not valid: it takes an integer from 1 to 10000",
        ),
        (
            ["uvicorn", "osiris.server:app"],
            {"SIDECAR_API_KEYS": "first-key-0123456789,weak"},
            # Without a key.
            "SIDECAR_API_KEYS=*** is not valid: it takes keys of 16 or more visible ASCII "
            "characters, separated by commas; each may be name=key, with a name of up to 32 "
            "characters a-z, 0-9, _ and -, and no key may have two names",
        ),
    ],
)
def test_a_bad_variable_stops_the_start_with_one_line(
    tmp_path: Path, command: list[str], environ: dict[str, str], line: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--port", str(free_port())],
        env={**environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line]


@pytest.mark.own_process("sends a signal")
def test_ctrl_c_lets_a_running_request_end_and_leaves_no_worker(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    """test_shutdown.py has SIGTERM and SIGHUP."""
    with serve(tmp_path, **random_models) as server:
        workers = load_both(server)

        async def interrupted() -> httpx.Response:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                # Long enough to be interrupted, and over within the grace on a slow machine too.
                body = PROMPT | {"max_length": 1000}
                asking = asyncio.create_task(client.post("/generate/hermes", json=body))
                while not (await client.get("/health")).json()["models"]["hermes"]["requests"]:
                    await asyncio.sleep(0.005)
                server.process.send_signal(signal.SIGINT)
                return await asking

        response = asyncio.run(interrupted())
        assert response.status_code == 200
        assert server.process.wait(30) is not None
        assert not any(map(is_running, workers))
        assert "Traceback" not in server.log.read_text()


@pytest.mark.not_on("ray", "another attempt answers: tests/scale kills replicas")
def test_a_killed_worker_is_503_and_the_next_request_succeeds(server: LiveServer) -> None:
    def tokens() -> int:
        return server.total("models", "hermes", "completion_tokens_total")

    short = PROMPT | {"max_length": 1}
    with ThreadPoolExecutor(1) as pool:
        # Every sidecar loads its model.
        for sidecar in server.sidecars:
            assert sidecar.client.post("/generate/hermes", json=short).status_code == 200
        before, restarts = tokens(), server.total("models", "hermes", "restarts")
        asking = pool.submit(httpx.post, f"{server.url}/generate/hermes", json=LONG, timeout=60)
        server.wait_until(lambda: tokens() > before, interval=0.001)
        for pid in server.workers("hermes"):
            os.kill(pid, signal.SIGKILL)
        response = asking.result()
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    again = server.client.post("/generate/hermes", json=PROMPT | {"max_length": 5})
    assert again.status_code == 200
    server.wait_until(
        lambda: server.total("models", "hermes", "restarts") == restarts + len(server.sidecars)
    )


@pytest.mark.own_process("passes an option of uvicorn, and sends a signal")
def test_reloading_leaves_no_worker(random_models: dict[str, str], tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "module.py").write_text("")
    options = ("--reload", "--reload-dir", str(watched))
    with serve(tmp_path, *options, **random_models) as server:
        workers = load_both(server)
        (watched / "module.py").write_text("changed = True")
        wait_until_gone(server, workers, 15.0)
        server.wait_until(lambda: server.client.get("/health/live").status_code == 200)
        assert server.client.post("/generate/phi3/", json=PROMPT).status_code == 200
        workers = [server.worker("phi3")]
        server.stop(signal.SIGINT)
        wait_until_gone(server, workers)


# With a real Redis


async def collect(url: str, *channels: str) -> tuple[EventBus, dict[str, asyncio.Queue[str]]]:
    bus = EventBus(url)
    await bus.connect()
    queues: dict[str, asyncio.Queue[str]] = {}
    for channel in channels:
        queues[channel] = asyncio.Queue()
        await bus.register_listener_queue(channel, queues[channel])
    return bus, queues


@pytest.fixture(scope="module")
def on_redis(
    redis_url: str, random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server whose bus is a real Redis."""
    folder = tmp_path_factory.mktemp("on-redis")
    with serve(folder, **(random_models | {"REDIS_URL": redis_url})) as server:
        server.wait_until_database_is_open()
        yield server


async def test_a_proposal_and_its_assessment_go_out_on_redis(
    redis_url: str, on_redis: LiveServer
) -> None:
    server = on_redis
    bus, queues = await collect(redis_url, "phi3.proposal.created", "phi3.proposal.assessed")
    try:
        response = await asyncio.to_thread(
            server.client.post, "/propose_trade_adjustments", json=PROMPT
        )
        body = response.json()
        async with asyncio.timeout(10):
            created = json.loads(await queues["phi3.proposal.created"].get())
            assessed = json.loads(await queues["phi3.proposal.assessed"].get())
    finally:
        await bus.close()
    assert created == body["phi3_proposal"] | {"transaction_id": body["transaction_id"]}
    assert set(assessed) == {
        *("proposal_transaction_id", "assessment_text", "timestamp", "score", "answer_mass")
    }
    assert assessed["proposal_transaction_id"] == body["transaction_id"]
    assert assessed["assessment_text"] == body["hermes_assessment"]


async def test_feedback_is_stored_once_from_http_and_from_the_bus(
    redis_url: str, on_redis: LiveServer
) -> None:
    server = on_redis
    ours = {"transaction_id": "ours", "feedback_type": "rating", "feedback_content": "5"}
    theirs = ours | {"transaction_id": "theirs", "timestamp": "2026-01-02T03:04:05Z"}
    written = rows_written(server)
    bus, queues = await collect(redis_url, "phi3.feedback.submitted")
    try:
        response = await asyncio.to_thread(server.client.post, "/feedback/phi3", json=ours)
        assert response.status_code == 200
        async with asyncio.timeout(10):
            published = json.loads(await queues["phi3.feedback.submitted"].get())
        assert published["transaction_id"] == "ours"
        assert published["schema_version"] == "1.0"
        await bus.publish("phi3.feedback.submitted", "not even json")
        for _ in range(2):
            await bus.publish("phi3.feedback.submitted", json.dumps(theirs))
        # The row of another message comes after any second row of these.
        last = json.dumps(theirs | {"transaction_id": "last"})
        await bus.publish("phi3.feedback.submitted", last)
        # The messages reach every sidecar, the request one of them.
        await asyncio.to_thread(wait_for_rows, server, written + 1 + 2 * len(server.sidecars))
    finally:
        await bus.close()
    async with server.stored() as store:
        rows = await store.last("phi3_feedback", 0)
    # This server has received what other tests published, too.
    found = [row["transaction_id"] for row in rows if row["transaction_id"] in ("ours", "theirs")]
    assert sorted(found) == ["ours", "theirs"]


async def test_feedback_received_before_the_database_opens_is_stored(
    redis_url: str, random_models: dict[str, str], tmp_path: Path
) -> None:
    feedback = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    in_the_way = tmp_path / "database"
    in_the_way.write_text("no folder")
    environ = random_models | {"REDIS_URL": redis_url, "LANCEDB_URI": str(in_the_way)}
    bus, _ = await collect(redis_url, "phi3.feedback.submitted")
    try:
        with serve(tmp_path, **environ) as server:

            def has_only_the_bus() -> bool:
                return all(
                    health["event_bus"]["connected"] and health["database"]["state"] == "away"
                    for health in server.healths()
                )

            def have_received_it() -> bool:
                said = server.logged().count("feedback of another service")
                return said >= len(server.sidecars)

            await asyncio.to_thread(server.wait_until, has_only_the_bus)
            await bus.publish("phi3.feedback.submitted", json.dumps(feedback))
            await asyncio.to_thread(server.wait_until, have_received_it)
            in_the_way.unlink()
            await asyncio.to_thread(wait_for_rows, server, 1)
    finally:
        await bus.close()
    store = await Store.open(in_the_way)
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert [{name: row[name] for name in feedback} for row in rows] == [feedback]


@pytest.mark.own_process("starts a second sidecar on the journal of the first")
async def test_feedback_received_by_several_sidecars_is_stored_once(
    redis_url: str, random_models: dict[str, str], tmp_path: Path
) -> None:
    environ = random_models | {"REDIS_URL": redis_url}
    bus, _ = await collect(redis_url, "phi3.feedback.submitted")
    try:
        with serve(tmp_path, **environ) as one, serve(tmp_path, **environ) as other:
            for server in (one, other):
                await asyncio.to_thread(server.wait_until_database_is_open)
            for number in range(10):
                feedback = {
                    "transaction_id": f"t-{number}",
                    "feedback_type": "rating",
                    "feedback_content": "5",
                }
                await bus.publish("phi3.feedback.submitted", json.dumps(feedback))
            for server in (one, other):
                await asyncio.to_thread(wait_for_rows, server, 10)
    finally:
        await bus.close()
    store = await Store.open(tmp_path / "lancedb")
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert sorted(row["transaction_id"] for row in rows) == [f"t-{n}" for n in range(10)]


@pytest.mark.own_process("kills the server")
async def test_a_killed_server_leaves_no_worker_and_loses_no_acknowledged_row(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    feedback = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    with serve(tmp_path, **random_models) as server:
        workers = load_both(server)
        # Immediately, so that the rows are most likely still in the journal.
        responses = [server.client.post("/feedback/phi3", json=feedback) for _ in range(3)]
        server.stop(signal.SIGKILL)
        wait_until_gone(server, workers)
    assert [response.status_code for response in responses] == [200] * 3
    with serve(tmp_path, **random_models) as server:
        server.wait_until_database_is_open()
    store = await Store.open(tmp_path / "lancedb")
    assert len(await store.last("phi3_feedback", 0)) == 3
    await store.close()


def rows_written(server: LiveServer) -> int:
    return server.total("database", "rows_written")


def wait_for_rows(server: LiveServer, count: int) -> None:
    server.wait_until(lambda: rows_written(server) >= count)


async def test_a_proposal_stores_a_run_and_a_score(on_redis: LiveServer) -> None:
    response = on_redis.client.post("/propose_trade_adjustments", json=PROMPT)
    async with on_redis.stored() as store:
        found = await store.transaction(response.json()["transaction_id"])
    assert found.pop("phi3_feedback") == found.pop("feedback_withdrawals") == []
    run, score, proposal = (rows[0] for rows in found.values())
    assert run["status"] == "success"
    assert run["input_query"] == PROMPT["prompt"]
    assert json.loads(run["final_output"])["proposal"] == response.json()["phi3_proposal"]
    assert score["rationale"] == response.json()["hermes_assessment"]
    assert score["score"] == pytest.approx(float(response.headers["X-Hermes-Score"]), abs=1e-6)
    assert json.loads(proposal["proposal"]) == response.json()["phi3_proposal"]
    assert proposal["prompt"] == PROMPT["prompt"]
    assert proposal["assessment"] == score["rationale"]
    assert proposal["score"] == score["score"]
    assert proposal["model"] == response.headers["X-Model"]
    assert proposal["adapter"] is None
    missing = ungrounded_fields(response.json()["phi3_proposal"], PROMPT["prompt"])
    # Random weights do not name the ticker of the prompt.
    assert missing[0] == "ticker"
    assert proposal["grounded"] == response.headers["X-Grounded"] == ",".join(missing)
    assert all(seconds > 0 for seconds in proposal["latencies"].values())
