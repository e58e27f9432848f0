"""The application on Ray Serve: its ports, its throughput, and what it survives under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from osiris.ray_serve import ports
from tests.live_server import LiveServer, is_running
from tests.ray_server import PYTHON, replicas, serve_ray

CLIENTS = 16
FAKE = {"FAKE_STEP_SECONDS": "0.02", "FAKE_CAPACITY": "4"}
DAYS = ("20260101", "20260102")
WORDS = 30


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two replicas of phi3 and one of hermes, with fake workers."""
    folder = tmp_path_factory.mktemp("ray")
    for day in DAYS:
        (folder / "adapters" / day).mkdir(parents=True)
        (folder / "adapters" / day / "adapter_config.json").touch()
    environ = FAKE | {
        "SIDECAR_DEMO": "true",
        "PHI3_ADAPTER_DIR": str(folder / "adapters"),
        # More than all clients of this file.
        "QUEUE_LENGTH": "100",
    }
    options = ("--model", "tests.fake_ray:make_model", "--phi3-min", "2")
    with serve_ray(folder, *options, **environ) as server:
        server.wait_until_ready()
        yield server


@contextlib.asynccontextmanager
async def client_of(server: LiveServer) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0, limits=limits) as client:
        yield client


async def ask(client: httpx.AsyncClient, model: str, text: str) -> str:
    """What a fake worker answers."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 100,
        "response_format": {"type": "text"},
    }
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


async def load(
    server: LiveServer,
    count: int,
    text: Callable[[int], str],
    model: str = "phi3",
    meanwhile: Callable[[int], Awaitable[None]] | None = None,
) -> list[str]:
    """The answers to `count` requests of all clients, in order.

    Args:
        meanwhile: runs after each answer, in the client that has it, with the number of answers.
    """
    numbers, answers, done = iter(range(count)), [""] * count, 0
    async with client_of(server) as client:

        async def one_client() -> None:
            nonlocal done
            for number in numbers:
                answers[number] = await ask(client, model, text(number))
                done += 1
                if meanwhile is not None:
                    await meanwhile(done)

        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(one_client())
    return answers


def words(number: int) -> str:
    return " ".join(f"{number}-{word}" for word in range(WORDS))


def adapters(number: int) -> str:
    return " ".join(["adapter"] * WORDS)


def expected(count: int) -> list[str]:
    return [words(number) + " " for number in range(count)]


def test_every_port_is_on_loopback(served: LiveServer) -> None:
    assert len(ports.tree(served.process.pid)) > 10
    assert ports.exposed(served.process.pid) == []


def test_who_has_no_token_gets_no_answer_of_ray(served: LiveServer, tmp_path: Path) -> None:
    (gcs,) = [
        argument.partition("=")[2]
        for pid in ports.tree(served.process.pid)
        for argument in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if argument.startswith("--gcs-address=") and "raylet" not in argument
    ][:1]
    token = tmp_path / "token"
    token.write_text("0" * 64)
    code = f"import ray; ray.init(address={gcs!r}); print(ray.nodes())"
    environ = {
        "PATH": os.environ["PATH"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    stranger = subprocess.run(
        [PYTHON, "-c", code], env=environ, capture_output=True, text=True, timeout=120
    )
    assert stranger.returncode == 1
    assert "AuthenticationError" in stranger.stderr
    assert stranger.stdout == ""


def test_an_answer_has_one_request_id(served: LiveServer) -> None:
    sent = served.client.get("/health/live", headers={"X-Request-ID": "abc"})
    assert sent.headers.get_list("x-request-id") == ["abc"]
    made = served.client.get("/health/live")
    assert len(made.headers.get_list("x-request-id")) == 1


def test_health_shows_each_replica(served: LiveServer) -> None:
    models = served.client.get("/health").json()["models"]
    assert [one["state"] for one in models["phi3"]["replicas"]] == ["ready", "ready"]
    assert len({one["pid"] for one in models["phi3"]["replicas"]}) == 2
    assert len(models["hermes"]["replicas"]) == 1


def test_an_error_of_a_replica_is_the_error_of_the_request(served: LiveServer) -> None:
    refused = served.client.post("/generate/hermes/", json={"prompt": "refuse"})
    assert refused.status_code == 422
    assert refused.json() == {"detail": "prompt: it does not fit"}


def test_a_client_that_disconnects_stops_the_generation(served: LiveServer) -> None:
    prompt = " ".join(["word"] * 90)
    headers = {"Accept": "text/event-stream"}
    body = {"prompt": prompt, "max_length": 90}

    def running() -> int:
        count: int = served.client.get("/health").json()["models"]["hermes"]["running"]
        return count

    def tokens() -> int:
        count: int = served.client.get("/health").json()["models"]["hermes"][
            "completion_tokens_total"
        ]
        return count

    with served.client.stream("POST", "/generate/hermes/", json=body, headers=headers) as answer:
        # Closing the iterator would close the connection.
        lines = answer.iter_lines()
        next(lines)
        assert running() == 1
    served.wait_until(lambda: running() == 0, seconds=2)
    # The status of the replicas is a second old.
    time.sleep(1.5)
    assert tokens() < 90


async def test_two_replicas_answer_more_than_one_and_a_half_times_as_many(
    served: LiveServer,
) -> None:
    seconds = {}
    for model in ("hermes", "phi3"):
        await load(served, CLIENTS, words, model)
        began = time.monotonic()
        assert await load(served, 4 * CLIENTS, words, model) == expected(4 * CLIENTS)
        seconds[model] = time.monotonic() - began
    ratio = seconds["hermes"] / seconds["phi3"]
    print(f"one replica {seconds['hermes']:.1f} s, two {seconds['phi3']:.1f} s: {ratio:.2f} times")
    assert ratio >= 1.6


async def test_no_request_of_500_fails_while_replicas_are_killed(served: LiveServer) -> None:
    killed = list[int]()

    async def kill(done: int) -> None:
        if done in (100, 250, 400):
            # The new replica of the last time serves by now, too.
            await asyncio.to_thread(wait_for_replicas, served, "phi3", 2)
            victim = replicas(served, "phi3")[0]
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)

    assert await load(served, 500, words, meanwhile=kill) == expected(500)
    assert len(set(killed)) == 3
    assert not any(map(is_running, killed))
    wait_for_replicas(served, "phi3", 2)


async def test_a_swap_under_load_fails_no_request_and_mixes_no_adapters(
    served: LiveServer,
) -> None:
    answers = list[str]()
    in_use = list[str | None]()

    async def swap() -> None:
        async with client_of(served) as client:
            for day in (*DAYS, DAYS[0]):
                response = await client.post("/adapters/swap", json={"adapter": day})
                assert response.status_code == 200, response.text
                # Every replica has it now.
                in_use.append(day)
                for answer in await asyncio.gather(
                    *(ask(client, "phi3", adapters(0)) for _ in range(4))
                ):
                    assert set(answer.split()) == {day}

    swapping = asyncio.create_task(swap())
    while not swapping.done():
        answers += await load(served, 2 * CLIENTS, adapters)
    await swapping
    assert in_use == [*DAYS, DAYS[0]]
    assert {len(set(answer.split())) for answer in answers} == {1}
    assert {answer.split()[0] for answer in answers} <= {"none", *DAYS}


async def test_a_refused_adapter_leaves_the_one_in_use_on_all_replicas(
    served: LiveServer, tmp_path: Path
) -> None:
    refused = await asyncio.to_thread(
        served.client.post, "/adapters/swap", json={"adapter": "20260301"}
    )
    assert refused.status_code == 409
    assert {answer.split()[0] for answer in await load(served, CLIENTS, adapters)} == {DAYS[0]}


async def test_a_rolling_update_under_load_fails_no_request_and_keeps_the_adapter(
    served: LiveServer,
) -> None:
    before = set(replicas(served, "phi3") + replicas(served, "sidecar"))
    answers = list[str]()
    served.process.send_signal(signal.SIGUSR1)
    while "all replicas are replaced" not in served.log.read_text():
        answers += await load(served, 2 * CLIENTS, adapters)
    assert {tuple(sorted(set(answer.split()))) for answer in answers} == {(DAYS[0],)}
    assert len(answers) >= 2 * CLIENTS
    served.wait_until(lambda: not any(map(is_running, before)), seconds=90)
    assert {answer.split()[0] for answer in await load(served, CLIENTS, adapters)} == {DAYS[0]}


def test_the_logs_have_no_prompt(served: LiveServer) -> None:
    assert "0-0 0-1" not in served.log.read_text()


def wait_for_replicas(server: LiveServer, model: str, count: int) -> None:
    def all_ready() -> bool:
        found = json.loads(server.client.get("/health").content)["models"][model]["replicas"]
        return [one["state"] for one in found] == ["ready"] * count

    server.wait_until(all_ready)
