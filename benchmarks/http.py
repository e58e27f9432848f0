"""How the API process answers while the models work: `python -m benchmarks.http`.

Starts the server with the demo models, says after how long it answers, lets 16 clients ask for
proposals without a pause, and meanwhile times `/health`, from a process of its own. Beside it
stands the same on an idle server. Wanted: the first answer within 1.5 s, 99 of 100 within 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx

from tests.live_server import serve

PROMPT = {"prompt": "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run."}
CLIENTS = 16
PAUSE = 0.01
"""Seconds between two probes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each measurement")
    seconds = parser.parse_args().seconds
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), SIDECAR_DEMO="true", PRELOAD_MODELS="true") as server,
    ):
        print(f"first answer {time.monotonic() - started:.2f} s after the start")
        server.wait_until_ready()
        server.client.post("/propose_trade_adjustments", json=PROMPT).raise_for_status()
        show("idle", probe(server.client, seconds))
        context = multiprocessing.get_context("spawn")
        stop, answered = context.Event(), context.Value("i", 0)
        load = context.Process(target=run_clients, args=(server.url, stop, answered))
        load.start()
        server.wait_until(lambda: answered.value >= CLIENTS)
        before, began = answered.value, time.monotonic()
        latencies = probe(server.client, seconds)
        rate = (answered.value - before) / (time.monotonic() - began)
        stop.set()
        load.join()
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


if __name__ == "__main__":
    main()
