"""The event bus beside bare redis-py: `python -m benchmarks.event_bus`.

One process publishes and another handles, through a redis-server that the benchmark starts.
Throughput counts from the first publish to the last handled message, sent one after the other at
full speed; latency is from publish to handler at a steady rate. Both sides take turns, in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

from redis.asyncio import Redis

from llm_sidecar.event_bus import EventBus
from tests.redis_server import RedisServer

CHANNEL = "benchmark"
PAYLOAD = "x" * 500
Publish = Callable[[str], Awaitable[Any]]
Handle = Callable[[str], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000, help="of each throughput round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second, for latency")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each latency round")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"bus": [], "bare": []}
    latencies: dict[str, list[float]] = {"bus": [], "bare": []}
    with RedisServer() as server:
        for number in range(options.rounds):
            # The sides alternate, so that neither always runs on a warmer machine.
            for side in sorted(rates, reverse=bool(number % 2)):
                _, seconds = measure(side, server.url, options.messages, None)
                rates[side].append(options.messages / seconds)
        for side in latencies:
            count = round(options.rate * options.seconds)
            latencies[side], _ = measure(side, server.url, count, options.rate)
    for side in ("bus", "bare"):
        cuts = statistics.quantiles(latencies[side], n=100)
        print(
            f"{side:4} {statistics.median(rates[side]):7,.0f} messages/s, at {options.rate:,.0f}/s "
            f"p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms"
        )
    ratios = [bus / bare for bus, bare in zip(rates["bus"], rates["bare"], strict=True)]
    print(f"throughput, bus to bare redis-py: {statistics.median(ratios):.2f}, of {options.rounds}")


def measure(side: str, url: str, messages: int, rate: float | None) -> tuple[list[float], float]:
    """Milliseconds of each message, and seconds from the first publish to the last one handled."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    publisher = context.Process(target=publish_all, args=(side, url, messages, rate, there))
    publisher.start()
    try:
        return asyncio.run(handle_all(side, url, messages, here))
    finally:
        publisher.join(10)
        publisher.kill()


async def handle_all(
    side: str, url: str, messages: int, publisher: Connection
) -> tuple[list[float], float]:
    latencies: list[float] = []
    done = asyncio.Event()
    first = 0

    def handle(payload: str) -> None:
        nonlocal first
        sent, _, _ = payload.partition(" ")
        first = first or int(sent)
        latencies.append((time.monotonic_ns() - int(sent)) / 1e6)
        if len(latencies) == messages:
            done.set()

    async with SUBSCRIBERS[side](url, handle):
        publisher.send("go")
        async with asyncio.timeout(120):
            await done.wait()
        return latencies, (time.monotonic_ns() - first) / 1e9


def publish_all(
    side: str, url: str, messages: int, rate: float | None, subscriber: Connection
) -> None:
    asyncio.run(_publish_all(side, url, messages, rate, subscriber))


async def _publish_all(
    side: str, url: str, messages: int, rate: float | None, subscriber: Connection
) -> None:
    async with PUBLISHERS[side](url) as publish:
        subscriber.recv()
        began = time.monotonic()
        for number in range(messages):
            if rate is not None:
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            await publish(f"{time.monotonic_ns()} {PAYLOAD}")


@asynccontextmanager
async def bus_publisher(url: str) -> AsyncIterator[Publish]:
    bus = EventBus(url)

    async def publish(payload: str) -> None:
        # Its outbox holds 10,000 events and drops the oldest ones beyond that.
        while bus.status()["waiting"] > 5_000:  # noqa: ASYNC110 - only counts are there
            await asyncio.sleep(0.001)
        await bus.publish(CHANNEL, payload)

    await bus.connect()
    yield publish
    await bus.close()


@asynccontextmanager
async def bare_publisher(url: str) -> AsyncIterator[Publish]:
    async with Redis.from_url(url, decode_responses=True) as client:
        yield lambda payload: client.publish(CHANNEL, payload)


@asynccontextmanager
async def bus_subscriber(url: str, handle: Handle) -> AsyncIterator[None]:
    async def handler(payload: str) -> None:
        handle(payload)

    bus = EventBus(url)
    await bus.connect()
    await bus.subscribe(CHANNEL, handler)
    yield
    await bus.close()


@asynccontextmanager
async def bare_subscriber(url: str, handle: Handle) -> AsyncIterator[None]:
    async def read() -> None:
        async for message in pubsub.listen():
            if message["type"] == "message":
                handle(message["data"])

    async with Redis.from_url(url, decode_responses=True) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(CHANNEL)
        reader = asyncio.create_task(read())
        yield
        reader.cancel()
        await asyncio.wait([reader])


PUBLISHERS = {"bus": bus_publisher, "bare": bare_publisher}
SUBSCRIBERS = {"bus": bus_subscriber, "bare": bare_subscriber}


if __name__ == "__main__":
    main()
