"""A soak of one server process: `python -m benchmarks.soak`.

Feedback and proposals, of models that answer at once, with a real Redis and a real database. After
each tenth the load pauses until the journal is empty and the heap is trimmed; then the process is
looked at: its resident memory, its descriptors, its threads and its tasks. Wanted: in the second
half the memory grows by less than 5 %, the descriptors and tasks not at all; in the end the journal
is empty, and every row and every event is there.

The default is a tenth of the size that a release needs, in about four minutes:

    python -m benchmarks.soak --feedback 200000 --proposals 20000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import psutil
from redis import Redis

from benchmarks import load
from llm_sidecar.db import Store
from llm_sidecar.db.rows import FEEDBACK, PROPOSALS, RUNS, SCORES
from llm_sidecar.db.verify import verify
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer

PARTS: Final = 10
PROMPT: Final = "Long ABC from 100, now 112.5."
REST: Final = 12.0
"""Seconds before the looks: longer than between two trims of the heap, so that memory which the
process only used for the last rows does not count."""
LOOKS: Final = 9
"""Looks at the process in each pause, of which the median counts."""
PAUSE: Final = 0.3
"""Seconds between two of them."""


class Seen(NamedTuple):
    """The process in a pause."""

    megabytes: float
    descriptors: int
    threads: int
    tasks: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--feedback", type=int, default=20_000)
    parser.add_argument("--proposals", type=int, default=2_000)
    parser.add_argument("--connections", type=int, default=16, help="of each kind of request")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
        folder = Path(name)
        environ = {"REDIS_URL": redis.url, "EVENT_STREAM_MAXLEN": "10000"}
        with serve(folder, "--no-access-log", app="tests.quick_app:app", **environ) as server:
            server.wait_until_ready()
            seen = soak(server, options.feedback, options.proposals, options.connections)
            health = server.client.get("/health").json()
        errors = [line for line in server.log.read_text().splitlines() if "ERROR" in line]
        with Redis.from_url(redis.url) as client:
            events = int(client.xinfo_stream("osiris.events")["entries-added"])
        found = asyncio.run(rows(folder / "lancedb"))
    report(seen, health, found, events, errors, options)


def soak(server: LiveServer, feedback: int, proposals: int, connections: int) -> list[Seen]:
    """Sends everything in parts; returns how the process was after each."""
    seen = [look(server)]
    for part in range(PARTS):
        content = {
            "transaction_id": f"{part}-{load.NUMBER}",
            "feedback_type": "rating",
            "feedback_content": "5",
        }
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            sending = [
                pool.submit(
                    load.rate,
                    server.url,
                    load.request("POST", path, json.dumps(body).encode()),
                    connections=connections,
                    requests=count // PARTS,
                )
                for path, body, count in (
                    ("/feedback/phi3/", content, feedback),
                    ("/propose_trade_adjustments/", {"prompt": PROMPT}, proposals),
                )
            ]
            rates = [one.result() for one in sending]
        seconds = time.monotonic() - began
        server.wait_until(lambda: is_empty(server.client), seconds=300, interval=0.5)
        seen.append(look(server))
        print(
            f"{part + 1}/{PARTS}: {seconds:.0f} s, {rates[0]:.0f} feedbacks/s, "
            f"{rates[1]:.0f} proposals/s, {seen[-1]}",
            flush=True,
        )
    return seen


def is_empty(client: httpx.Client) -> bool:
    journal = client.get("/health").json()["database"]["journal"]
    return bool(journal["rows"] == journal["events"] == 0)


def look(server: LiveServer) -> Seen:
    process = psutil.Process(server.process.pid)
    looks = []
    time.sleep(REST)
    for _ in range(LOOKS):
        time.sleep(PAUSE)
        tasks = int(server.client.get("/tasks").text)
        with process.oneshot():
            looks.append(
                (
                    process.memory_info().rss / 1e6,
                    process.num_fds(),
                    process.num_threads(),
                    tasks,
                )
            )
    megabytes, *counts = (statistics.median(column) for column in zip(*looks, strict=True))
    return Seen(round(megabytes, 1), *map(int, counts))


async def rows(folder: Path) -> dict[str, int]:
    """The rows of each table, all of which are readable and have a key of their own."""
    store = await Store.open(folder, create=False)
    try:
        results = await verify(await store.moved(), lambda _: None)
    finally:
        await store.close()
    assert all(result.is_sound for result in results), results
    return {result.table: result.rows for result in results}


def report(
    seen: list[Seen],
    health: dict[str, Any],
    found: dict[str, int],
    events: int,
    errors: list[str],
    options: argparse.Namespace,
) -> None:
    middle, last = seen[PARTS // 2], seen[-1]
    feedback = options.feedback // PARTS * PARTS
    proposals = options.proposals // PARTS * PARTS
    journal = health["database"]["journal"]
    print(
        f"memory: {middle.megabytes} MB to {last.megabytes} MB in the second half, a growth of "
        f"{100 * (last.megabytes / middle.megabytes - 1):.1f} % (wanted: less than 5 %)"
    )
    print(
        f"descriptors: {middle.descriptors} to {last.descriptors}; threads: {middle.threads} to "
        f"{last.threads}; tasks: {middle.tasks} to {last.tasks} (wanted: no more)"
    )
    print(f"journal in the end: {journal['rows']} rows, {journal['events']} events")
    wanted = {FEEDBACK: feedback, RUNS: proposals, PROPOSALS: proposals, SCORES: proposals}
    for table, count in wanted.items():
        print(f"{table}: {found[table]} rows of {count}")
    print(f"events: {events} of {feedback + 2 * proposals}")
    print(f"lines of errors in the log: {len(errors)}", *errors[:5], sep="\n")


if __name__ == "__main__":
    main()
