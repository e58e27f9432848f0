"""The cost of HTTP: `python -m benchmarks.http`.

1. How the API process answers while the models work: after how long it answers first, and how long
   `/health` takes while 16 clients ask for proposals without a pause. Wanted: the first answer
   within 1.5 s, 99 of 100 probes within 50 ms.
2. `/health` against an endpoint of bare FastAPI on the same HTTP parser, h11, requests per second.
   Wanted: 0.6 of them. Beside it, with nothing wanted, bare FastAPI on httptools.
3. Metrics, traces, Sentry (with a tenth of its own traces), profiling, keys and JSON logs all on,
   against all of it off, proposals per second; and the same with an OTLP receiver and a Sentry that
   hang, and that are not there; by the rate of four clients, and by the time of single requests.
   Wanted: at most 5 % less. Beside it, with nothing wanted, feedback, which no model takes part in.

The sides of a ratio take turns, in another order each round; the result is the median of the
rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks import load
from tests.live_server import LiveServer, free_port, serve
from tests.receiver import Receiver

PROMPT: Final = {"prompt": "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."}
FEEDBACK: Final = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
DEMO: Final = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true"}
KEY: Final = "a-key-for-the-benchmark"
CLIENTS: Final = 16
TURN: Final = 3.0
"""Seconds that a server works in a round, about: the first requests of each are profiled, and few
of the others."""
PAUSE: Final = 0.01
"""Seconds between two probes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="length of each measurement of probes"
    )
    parser.add_argument("--rounds", type=int, default=20, help="in which both sides take turns")
    options = parser.parse_args()
    responsiveness(options.seconds)
    against_bare_fastapi(options.rounds)
    observed(options.rounds)


def responsiveness(seconds: float) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), **DEMO) as server:
        print(f"first answer {time.monotonic() - started:.2f} s after the start")
        server.wait_until_ready()
        server.client.post("/propose_trade_adjustments", json=PROMPT).raise_for_status()
        show("idle", probe(server.client, seconds))
        context = multiprocessing.get_context("spawn")
        stop, answered = context.Event(), context.Value("i", 0)
        clients = context.Process(target=run_clients, args=(server.url, stop, answered))
        clients.start()
        server.wait_until(lambda: answered.value >= CLIENTS)
        before, began = answered.value, time.monotonic()
        latencies = probe(server.client, seconds)
        rate = (answered.value - before) / (time.monotonic() - began)
        stop.set()
        clients.join()
        show(f"{CLIENTS} clients, {rate:.1f} proposals/s", latencies)


def probe(client: httpx.Client, seconds: float) -> list[float]:
    """Milliseconds that each `/health` took."""
    latencies = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        client.get("/health").raise_for_status()
        latencies.append(1000 * (time.perf_counter() - began))
        time.sleep(PAUSE)
    return latencies


def show(name: str, latencies: list[float]) -> None:
    percentiles = statistics.quantiles(latencies, n=100)
    print(
        f"/health, {name}: {len(latencies)} probes, p50 {percentiles[49]:.1f} ms, "
        f"p99 {percentiles[98]:.1f} ms, most {max(latencies):.1f} ms"
    )


def run_clients(url: str, stop: Event, answered: multiprocessing.sharedctypes.Synchronized) -> None:  # type: ignore[type-arg]
    async def one(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            response = await client.post("/propose_trade_adjustments", json=PROMPT)
            response.raise_for_status()
            answered.value += 1

    async def every() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
            await asyncio.gather(*(one(client) for _ in range(CLIENTS)))

    asyncio.run(every())


def against_bare_fastapi(rounds: int) -> None:
    # Neither writes a line for each request: ours never does for probes.
    quiet = "--no-access-log"
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), quiet, "--http", "h11", app="benchmarks.bare:app") as bare,
        serve(Path(folder), quiet, "--http", "httptools", app="benchmarks.bare:app") as quick,
        serve(Path(folder), quiet, **DEMO) as ours,
    ):
        ours.wait_until_ready()
        message = load.request("GET", "/health")
        servers = {
            "bare FastAPI": bare,
            "bare FastAPI on httptools": quick,
            "the sidecar": ours,
        }
        in_turns("/health", servers, message, 4, rounds)


def observed(rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        on = {
            "all on": (Receiver(), Receiver()),
            "all on, receivers hang": (Receiver(hanging=True), Receiver(hanging=True)),
        }
        ports = {
            name: [stack.enter_context(receiver).port for receiver in receivers]
            for name, receivers in on.items()
        }
        ports["all on, receivers away"] = [free_port(), free_port()]
        environs = {"all off": DEMO, **{name: everything(*pair) for name, pair in ports.items()}}
        servers = {}
        for name, environ in environs.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers[name] = stack.enter_context(serve(folder, **environ))
        for server in servers.values():
            server.wait_until_ready()
        for what, path, body, clients in (
            ("proposals", "/propose_trade_adjustments/", PROMPT, 4),
            ("feedback", "/feedback/phi3/", FEEDBACK, CLIENTS),
        ):
            message = load.request("POST", path, json.dumps(body).encode(), {"X-API-Key": KEY})
            in_turns(what, servers, message, clients, rounds)
        one_by_one(servers, 40 * rounds)


def one_by_one(servers: Mapping[str, LiveServer], rounds: int) -> None:
    """Prints how long single proposals take, each server's in turn: the finest comparison."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 5):
        for name in random.sample(list(servers), len(servers)):
            began = time.perf_counter()
            answer = servers[name].client.post(
                "/propose_trade_adjustments/", json=PROMPT, headers={"X-API-Key": KEY}
            )
            answer.raise_for_status()
            if number >= 5:
                seconds[name].append(time.perf_counter() - began)
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in seconds.items()}
    first = quartiles[next(iter(servers))]
    for name, found in quartiles.items():
        quick, middle, _ = (one / other for one, other in zip(found, first, strict=True))
        print(
            f"one proposal at a time, {name}: median {1000 * found[1]:.1f} ms of "
            f"{len(seconds[name])}, {middle:.3f} of the first; lower quartile, which other work of "
            f"the machine sways least, {quick:.3f} of the first's",
            flush=True,
        )


def everything(otlp_port: int, sentry_port: int) -> dict[str, str]:
    return {
        **DEMO,
        "ENABLE_METRICS": "true",
        "ENABLE_PROFILING": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp_port}",
        "SENTRY_DSN": f"http://key@127.0.0.1:{sentry_port}/1",
        "SENTRY_TRACES_SAMPLE_RATE": "0.1",
        "SIDECAR_API_KEYS": KEY,
        "LOG_FORMAT": "json",
    }


def in_turns(
    what: str,
    servers: Mapping[str, LiveServer],
    message: bytes,
    connections: int,
    rounds: int,
) -> None:
    """Prints each server's median rate, the median of its ratios to the first of the round, and the
    processor time of a request, in which the server has to be the only one at work."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    busy = dict.fromkeys(servers, 0.0)
    rate = load.rate(
        next(iter(servers.values())).url,
        message,
        connections=connections,
        requests=10 * connections,
    )
    requests = max(connections, round(rate * TURN))
    # The first round warms up.
    for number in range(rounds + 1):
        for name in random.sample(list(servers), len(servers)):
            before = processor_seconds(servers[name].process.pid)
            rate = load.rate(servers[name].url, message, connections=connections, requests=requests)
            if number > 0:
                rates[name].append(rate)
                busy[name] += processor_seconds(servers[name].process.pid) - before
    first = next(iter(servers))
    for name, found in rates.items():
        ratios = sorted(one / other for one, other in zip(found, rates[first], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{what}, {name}: {statistics.median(found):,.1f} requests/s, {middle:.3f} of the "
            f"first (quartiles {low:.3f} and {high:.3f}); processor time "
            f"{1000 * busy[name] / rounds / requests:.2f} ms a request, "
            f"{busy[name] / busy[first]:.3f} of the first",
            flush=True,
        )


def processor_seconds(pid: int) -> float:
    """Processor time of a process, its threads and its children, in seconds."""
    process = psutil.Process(pid)
    used = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(times.user + times.system for times in used))


if __name__ == "__main__":
    main()
