"""The demo models on Ray Serve while replicas die, and a replica that starts under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.models import prompts
from llm_sidecar.db import Store
from osiris.llm_client import LLMClient
from osiris.ray_serve import ports
from tests.live_server import LiveServer
from tests.ray_server import replicas, serve_ray

CLIENTS = 16
PROPOSALS = 500
DEMO = {"SIDECAR_DEMO": "true", "QUEUE_LENGTH": "100"}


@contextlib.asynccontextmanager
async def client_of(server: LiveServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        yield client


async def propose(
    server: LiveServer, count: int, victims: dict[int, str] | None = None
) -> list[dict[str, Any]]:
    """The answers to `count` proposals by all clients.

    Args:
        victims: the model of which a replica is killed, by the number of answers so far.
    """
    asked, answers = iter(prompts(count)), list[dict[str, Any]]()
    async with client_of(server) as client:

        async def one_client() -> None:
            for prompt in asked:
                response = await client.post("/propose_trade_adjustments/", json={"prompt": prompt})
                assert response.status_code == 200, response.text
                answers.append(response.json())
                if victims and (name := victims.get(len(answers))):
                    os.kill(replicas(server, name)[0], signal.SIGKILL)

        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(one_client())
    return answers


def states(server: LiveServer, model: str) -> list[str]:
    found = server.client.get("/health").json()["models"][model]["replicas"]
    return [one["state"] for one in found]


async def test_no_proposal_of_500_fails_while_replicas_of_both_models_are_killed(
    tmp_path: Path,
) -> None:
    options = ("--phi3-min", "2", "--hermes-min", "2")
    with serve_ray(tmp_path, *options, **DEMO) as server:
        server.wait_until(lambda: len(states(server, "hermes")) == 2)
        began = time.monotonic()
        answers = await propose(server, PROPOSALS, {100: "phi3", 250: "hermes", 400: "phi3"})
        seconds = time.monotonic() - began
        memory = sum(map(pss, ports.tree(server.process.pid)))
        print(f"{PROPOSALS} proposals in {seconds:.0f} s, {memory:.0f} MB")
        server.wait_until(lambda: states(server, "phi3") == ["ready"] * 2)
        server.wait_until(lambda: states(server, "hermes") == ["ready"] * 2)
        # The client sends a request again with the same key if the sidecar dies.
        os.kill(replicas(server, "sidecar")[0], signal.SIGKILL)
        with LLMClient(server.url, retries=8) as client:
            answers.append(client.propose_trade_adjustments(next(iter(prompts(1)))))
    store = await Store.open(tmp_path / "lancedb", create=False)
    rows = await store.last("hermes_scores", 0)
    await store.close()
    ids = [answer["transaction_id"] for answer in answers]
    assert len(set(ids)) == PROPOSALS + 1
    assert sorted(row["run_id"] for row in rows) == sorted(ids)


def pss(pid: int) -> float:
    """The memory of a process in MB, with its part of shared pages."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


async def test_a_second_replica_starts_under_load(tmp_path: Path) -> None:
    options = ("--phi3-max", "2", "--ongoing", "4", "--model", "tests.fake_ray:make_model")
    fake = {"FAKE_STEP_SECONDS": "0.02", "FAKE_CAPACITY": "2"}
    body = {
        "model": "phi3",
        "messages": [{"role": "user", "content": " ".join(["word"] * 60)}],
        "response_format": {"type": "text"},
    }
    with serve_ray(tmp_path, *options, **DEMO, **fake) as server:
        assert states(server, "phi3") == ["ready"]
        deadline = time.monotonic() + 120
        async with client_of(server) as client:

            async def one_client() -> None:
                while len(states(server, "phi3")) == 1 and time.monotonic() < deadline:
                    answer = await client.post("/v1/chat/completions", json=body)
                    assert answer.status_code == 200, answer.text

            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(one_client())
        assert states(server, "phi3") == ["ready", "ready"]
