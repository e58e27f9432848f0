"""The database beside plain LanceDB: `python -m benchmarks.data`.

In one run: durable appends a second with many callers at once, in turns with a bare loop that
commits the same rows to SQLite in groups, and single rows added to a LanceDB table one after the
other; what is on disk afterwards; and each query at ten thousand and at a million rows. Rows arrive
at a steady rate of ten thousand a day. So a large table covers a hundred times as many days as a
small one, and its last day has as many rows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import lancedb
import pyarrow as pa

from llm_sidecar.db import RUNS, SCORES, HermesScoreSchema, Store
from llm_sidecar.db.schema import arrow_schemas

RATIONALE: Final = "The stop is close to the price and the target twice as far away. " * 2
A_DAY: Final = 10_000
SMALL: Final = A_DAY
REPEATS: Final = 31
TURNS: Final = 5

Append = Callable[[HermesScoreSchema], Awaitable[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--appends", type=int, default=50_000)
    parser.add_argument("--adds", type=int, default=300, help="of the plain side")
    parser.add_argument("--large", type=int, default=1_000_000, help="rows of the large table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), options))


async def run(folder: Path, options: argparse.Namespace) -> None:
    plain = await plain_adds(folder / "plain", options.adds)
    print(f"plain table.add, one row after the other: {plain:,.0f} rows/s, nothing synced")
    store = await Store.open(folder / "durable")
    turn = options.appends // TURNS
    ours, bare = [], []
    for number in range(TURNS):
        ours.append(await in_turn(store.append, options.callers, turn))
        async with bare_loop(folder / f"bare-{number}") as append:
            bare.append(await in_turn(append, options.callers, turn))
    await store.close()
    durable, p99 = (statistics.median(column) for column in zip(*ours, strict=True))
    floor, floor_p99 = (statistics.median(column) for column in zip(*bare, strict=True))
    print(f"median of {TURNS} turns with {options.callers} callers:")
    print(f"  durable appends: {durable:,.0f} rows/s, p99 {p99 * 1e3:.1f} ms")
    print(f"  bare SQLite in groups: {floor:,.0f} rows/s, p99 {floor_p99 * 1e3:.1f} ms")
    print(f"  to bare SQLite: {durable / floor:.2f} (wanted: 0.5)")
    print(f"  to plain adds: {durable / plain:.0f} (wanted: 10)")
    files, size = on_disk(folder / "durable")
    print(f"{files} files (wanted: under 500), {size:.1f} MB after {options.appends:,} appends")
    small = await answers(folder / "small", SMALL)
    large = await answers(folder / "large", options.large)
    print(f"median of {REPEATS}: {SMALL:,} rows, {options.large:,} rows, ratio (wanted: 3, 30 ms)")
    for query, seconds in small.items():
        print(
            f"  {query:22}{seconds * 1e3:6.1f} ms {large[query] * 1e3:6.1f} ms"
            f"  {large[query] / seconds:.2f}"
        )


def a_score(number: int) -> HermesScoreSchema:
    return HermesScoreSchema(run_id=f"run-{number}", score=0.5, rationale=RATIONALE)


async def plain_adds(folder: Path, count: int) -> float:
    """Rows a second."""
    connection = await lancedb.connect_async(folder)
    schema = arrow_schemas()[SCORES]
    table = await connection.create_table(SCORES, schema=schema)
    began = time.perf_counter()
    for number in range(count):
        await table.add(pa.Table.from_pylist([a_score(number).as_row()], schema=schema))
    return count / (time.perf_counter() - began)


async def in_turn(append: Append, callers: int, count: int) -> tuple[float, float]:
    """Rows a second until all are acknowledged, and the 99th percentile of an append in seconds."""
    took: list[float] = []

    async def caller(first: int) -> None:
        for number in range(first, count, callers):
            began = time.perf_counter()
            await append(a_score(number))
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    return count / (time.perf_counter() - began), statistics.quantiles(took, n=100)[-1]


@contextlib.asynccontextmanager
async def bare_loop(folder: Path) -> AsyncIterator[Append]:
    """Only appends to a SQLite table, through a thread with group commits."""
    db = sqlite3.connect(f"{folder}.sqlite3", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, data BLOB)")
    loop, arrived = asyncio.get_running_loop(), threading.Condition()
    waiting: list[tuple[bytes, asyncio.Future[None]]] = []
    ended = threading.Event()

    def commit() -> None:
        while not ended.is_set():
            with arrived:
                arrived.wait_for(lambda: waiting or ended.is_set())
                group = waiting[:]
                waiting.clear()
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO rows (data) VALUES (?)", [[data] for data, _ in group])
            db.execute("COMMIT")
            loop.call_soon_threadsafe(wake, [one for _, one in group])

    def wake(group: list[asyncio.Future[None]]) -> None:
        for one in group:
            one.set_result(None)

    async def append(row: HermesScoreSchema) -> None:
        done = loop.create_future()
        data = json.dumps(row.as_row(), default=str).encode()
        with arrived:
            waiting.append((data, done))
            arrived.notify()
        await done

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        yield append
    finally:
        ended.set()
        with arrived:
            arrived.notify()
        await asyncio.to_thread(thread.join)
        db.close()


def on_disk(folder: Path) -> tuple[int, float]:
    """Files, and megabytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes) / 1e6


async def answers(folder: Path, rows: int) -> dict[str, float]:
    """Median seconds of each query."""
    store = await Store.open(folder)
    await fill(store, rows)
    middle = f"run-{rows // 2}"
    now = datetime.datetime.now(datetime.UTC)
    queries: dict[str, Callable[[], Awaitable[Any]]] = {
        "last 24 hours' mean": lambda: store.mean_score_since(now - datetime.timedelta(hours=24)),
        "last 20 runs": lambda: store.last(RUNS, 20),
        "one transaction": lambda: store.transaction(middle),
    }
    found = {}
    for name, query in queries.items():
        took = []
        for _ in range(REPEATS + 2):
            began = time.perf_counter()
            await query()
            took.append(time.perf_counter() - began)
        # The first ones read the index from the disk.
        found[name] = statistics.median(took[2:])
    await store.close()
    return found


async def fill(store: Store, rows: int) -> None:
    """Runs and scores up to now, one of each every 8.64 seconds."""
    tables = await store.opened()
    now = datetime.datetime.now(datetime.UTC)
    step = datetime.timedelta(days=1) / A_DAY
    for start in range(0, rows, 50_000):
        numbers = range(start, min(rows, start + 50_000))
        common = {
            "run_id": [f"run-{number}" for number in numbers],
            "timestamp": [now - step * (rows - 1 - number) for number in numbers],
            "row_id": [f"{number:032}" for number in numbers],
        }
        count = len(numbers)
        columns: dict[str, dict[str, list[Any]]] = {
            SCORES: {"score": [0.5] * count, "rationale": [RATIONALE] * count},
            RUNS: {
                "input_query": [RATIONALE] * count,
                "final_output": [RATIONALE * 2] * count,
                "status": ["success"] * count,
                "error_message": [None] * count,
            },
        }
        for name, own in columns.items():
            await tables[name].add(pa.table(common | own, schema=arrow_schemas()[name]))
    await store.compact()


if __name__ == "__main__":
    main()
