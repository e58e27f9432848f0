"""Replicas in a real server: their throughput, and what happens when they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx

from benchmarks import capacity
from benchmarks.models import prompts
from tests.live_server import LiveServer, serve

PROPOSALS = 100
CLIENTS = 16


def test_the_simulation_holds_and_eight_replicas_do_the_work_of_more_than_seven() -> None:
    rows = {row.replicas: row for row in capacity.check()}
    for row in rows.values():
        print(f"{row.replicas} replicas: {row.real:.2f}/s, simulated {row.simulated:.2f}/s")
    assert list(rows) == [1, 2, 4, 8]
    assert all(abs(row.error) <= 0.15 for row in rows.values())
    assert rows[8].real / rows[1].real >= 7.2


def test_no_proposal_fails_while_workers_of_both_models_are_killed(tmp_path: Path) -> None:
    environ = {
        "SIDECAR_DEMO": "true",
        "PRELOAD_MODELS": "true",
        "PHI3_REPLICAS": "2",
        "HERMES_REPLICAS": "2",
    }
    with serve(tmp_path, **environ) as server:
        server.wait_until(lambda: capacity.all_loaded(server), seconds=120)
        statuses = asyncio.run(propose(server))
        server.wait_until(lambda: capacity.all_loaded(server), seconds=120)
        health = server.client.get("/health").json()
    assert statuses == [200] * PROPOSALS
    assert {name: model["restarts"] for name, model in health["models"].items()} == {
        "phi3": 1,
        "hermes": 1,
    }


async def propose(server: LiveServer) -> list[int]:
    """The statuses of all proposals by several clients, during which a worker of each model is
    killed."""
    victims = {PROPOSALS // 4: server.worker("phi3"), PROPOSALS // 2: server.worker("hermes")}
    asked, statuses = iter(prompts(PROPOSALS)), list[int]()
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:

        async def ask() -> None:
            for prompt in asked:
                response = await client.post("/propose_trade_adjustments/", json={"prompt": prompt})
                statuses.append(response.status_code)
                if (pid := victims.get(len(statuses))) is not None:
                    os.kill(pid, signal.SIGKILL)

        await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return statuses
