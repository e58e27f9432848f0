"""Two sidecars of one application on Ray Serve, with a Redis and replicas that they share."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.live_server import LiveServer
from tests.ray_server import replicas, serve_ray
from tests.redis_server import RedisServer, require_redis

DAYS = ("20260101", "20260102")


def adapter_of_an_answer(server: LiveServer) -> str:
    body = {
        "model": "phi3",
        "messages": [{"role": "user", "content": "adapter adapter"}],
        "response_format": {"type": "text"},
    }
    answer = server.client.post("/v1/chat/completions", json=body).raise_for_status().json()
    first, second = answer["choices"][0]["message"]["content"].split()
    assert first == second
    return str(first)


def test_a_swap_by_one_sidecar_changes_all_replicas_and_the_other_sidecar(tmp_path: Path) -> None:
    require_redis()
    for day in DAYS:
        (tmp_path / "adapters" / day).mkdir(parents=True)
        (tmp_path / "adapters" / day / "adapter_config.json").touch()
    options = ("--model", "tests.fake_ray:make_model", "--phi3-min", "2", "--sidecars", "2")
    with RedisServer() as redis:
        environ = {
            "SIDECAR_DEMO": "true",
            "PHI3_ADAPTER_DIR": str(tmp_path / "adapters"),
            "REDIS_URL": redis.url,
        }
        with serve_ray(tmp_path, *options, **environ) as server:
            assert len(replicas(server, "sidecar")) == 2
            assert adapter_of_an_answer(server) == "none"
            for day in (*DAYS, DAYS[0]):
                swapped = server.client.post("/adapters/swap", json={"adapter": day})
                assert swapped.status_code == 200, swapped.text
                assert {adapter_of_an_answer(server) for _ in range(12)} == {day}
                date = f"2026-01-0{day[-1]}"
                server.wait_until(functools.partial(show, server, date))
            # Neither has taken another one for the right one.
            assert {adapter_of_an_answer(server) for _ in range(12)} == {DAYS[0]}


def show(server: LiveServer, date: str) -> bool:
    """Whether both sidecars show this adapter; each answers some of the requests."""
    return {server.client.get("/health").json()["phi3_adapter_date"] for _ in range(12)} == {date}
