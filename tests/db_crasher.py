"""Processes that write to one database and are killed while they write.

Run as a program, it imports lancedb once and forks a process for each round, so that fifty kills
take seconds. Forking is safe as long as this process has not used lancedb. Each process sends the
keys of its acknowledged rows through a pipe.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lancedb  # noqa: F401 otherwise each process would import it, which takes seconds
import pyarrow  # noqa: F401 the same
from llm_sidecar.db.log import segments

from llm_sidecar.db import (
    FEEDBACK,
    RUNS,
    SCORES,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    Store,
    compaction,
    mover,
)
from llm_sidecar.db.verify import verify

_CALLERS = 8
_MOST_LOSSES = 20


def shorten_pauses() -> None:
    """Makes moves and compactions so frequent that kills interrupt both."""
    shortened = (
        (mover, "_MOVE_EVERY", 0.02),
        (compaction, "_PAUSE", 0.05),
        (compaction, "_SHARE", 1.0),
        (compaction, "FRAGMENTS", 3),
    )
    for module, name, value in shortened:
        assert hasattr(module, name)
        setattr(module, name, value)


def row(name: str, number: int) -> Phi3FeedbackSchema | OrchestratorRunSchema | HermesScoreSchema:
    """A row of one of three tables, with a unique key."""
    key = f"{name}-{number}"
    if number % 3 == 0:
        return Phi3FeedbackSchema(
            transaction_id=key, feedback_type="rating", feedback_content="x" * 50
        )
    if number % 3 == 1:
        return OrchestratorRunSchema(
            run_id=key, input_query="x" * 200, final_output="{}", status="success"
        )
    return HermesScoreSchema(run_id=key, score=0.5, rationale="x" * 50)


async def write(folder: Path, name: str, acknowledged: int, seconds: float) -> None:
    """Appends with several callers, and writes the key of each acknowledged row to a pipe."""
    store = Store(folder)
    store.start()
    end = time.monotonic() + seconds

    async def caller(first: int) -> None:
        number = first
        while time.monotonic() < end:
            await store.append(row(name, number))
            os.write(acknowledged, f"{name}-{number}\n".encode())
            number += _CALLERS

    await asyncio.gather(*(caller(number) for number in range(_CALLERS)))
    await store.close()


async def check(folder: Path, acknowledged: list[str], exact: bool) -> None:
    """Opens the database and asserts that it has every acknowledged row, and no row twice.

    Args:
        exact: whether it must have no other row.
    """
    store = await Store.open(folder)
    try:
        results = await verify(await store.opened(), lambda _: None)
        assert all(result.is_sound for result in results), results
        columns = {FEEDBACK: "transaction_id", RUNS: "run_id", SCORES: "run_id"}
        found: Counter[str] = Counter()
        for table, column in columns.items():
            found.update(line[column] for line in await store.last(table, 0))
    finally:
        await store.close()
    lost = set(acknowledged) - set(found)
    assert not lost, f"lost {len(lost)} of {len(acknowledged)}: {sorted(lost)[:5]}"
    duplicates = [key for key, count in found.items() if count > 1]
    assert not duplicates, f"duplicates: {duplicates[:5]}"
    assert not exact or len(found) == len(acknowledged), f"{len(found)} of {len(acknowledged)}"


def run_writer(folder: Path, name: str, acknowledged: int, seconds: float) -> None:
    shorten_pauses()
    asyncio.run(write(folder, name, acknowledged, seconds))


def run_check(folder: Path, acknowledged: list[str], exact: bool = False) -> None:
    asyncio.run(check(folder, acknowledged, exact))


def say(**result: Any) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


def forked(work: Callable[[], Any]) -> int:
    """Runs `work` in a new process; returns its id."""
    with warnings.catch_warnings():
        # lancedb warns about forks after its use.
        warnings.simplefilter("ignore", RuntimeWarning)
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:  # noqa: BLE001 only the exit status and this line report it
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def succeeded(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def write_and_kill(folder: Path, name: str, seconds: float) -> list[str]:
    """Kills a writing process after some seconds; returns the keys of its acknowledged rows."""
    read, acknowledge = os.pipe()
    process = forked(partial(run_writer, folder, name, acknowledge, 60.0))
    os.close(acknowledge)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(read) as pipe:
        # A line that the kill has truncated is not an acknowledgement.
        return [line.rstrip("\n") for line in pipe if line.endswith("\n")]


def lose_power(folder: Path, rng: random.Random) -> None:
    """Truncates, zeroes or deletes what is not synced yet: files of tables that are newer than the
    note of synced versions, and bytes after the last record of a log."""
    logs = folder / "_log"
    note = logs / "synced.json"
    synced = note.stat().st_mtime_ns if note.exists() else 0
    for path in folder.glob("*.lance/**/*"):
        if path.is_file() and path.stat().st_mtime_ns > synced and rng.random() < 0.7:
            _damage(path, rng)
    for own in logs.iterdir():
        for segment in segments(own) if (own / "lock").exists() else []:
            with segment.open("ab") as file:
                file.write(rng.choice((b"\0" * 4096, b"\xf5ROW\x40", b"")))


def _damage(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    kind = rng.randrange(3)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        os.truncate(path, rng.randrange(size + 1))
    else:
        start = rng.randrange(size + 1)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\0" * (size - start))


def kills(folder: Path, rounds: int, rng: random.Random) -> None:
    """Kills a writer in each round; checks the database after every tenth and after the last."""
    acknowledged: list[str] = []
    for number in range(1, rounds + 1):
        acknowledged += write_and_kill(folder, f"r{number}", rng.uniform(0.02, 0.5))
        if number % 10 == 0 or number == rounds:
            assert succeeded(forked(partial(run_check, folder, acknowledged)))
    say(kills=rounds, rows=len(acknowledged))


def power_losses(folder: Path, rounds: int, rng: random.Random) -> None:
    """In each round kills a writer, damages what was not synced, and checks the database.

    More rounds follow, up to `_MOST_LOSSES`, until the damage makes a version unreadable.
    """
    aside = folder / "_log" / "set_aside"
    acknowledged: list[str] = []
    number = 0
    while number < rounds or (not aside.exists() and number < _MOST_LOSSES):
        number += 1
        acknowledged += write_and_kill(folder, f"r{number}", rng.uniform(0.1, 0.5))
        lose_power(folder, rng)
        assert succeeded(forked(partial(run_check, folder, acknowledged)))
    count = len(list(aside.iterdir())) if aside.exists() else 0
    say(losses=number, rows=len(acknowledged), set_aside=count)


def concurrent(folder: Path, processes: int, seconds: float) -> None:
    """Several processes append at the same time and end normally."""
    read, acknowledge = os.pipe()
    writers = [
        forked(partial(run_writer, folder, f"p{number}", acknowledge, seconds))
        for number in range(processes)
    ]
    os.close(acknowledge)
    with os.fdopen(read) as pipe:
        acknowledged = pipe.read().splitlines()
    results = [succeeded(process) for process in writers]
    assert all(results)
    assert succeeded(forked(partial(run_check, folder, acknowledged, exact=True)))
    say(processes=processes, rows=len(acknowledged))


def main() -> None:
    what, folder, amount, seed = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    rng = random.Random(seed)
    if what == "kills":
        kills(folder, int(amount), rng)
    elif what == "once":
        say(keys=write_and_kill(folder, "r", amount))
    elif what == "power":
        power_losses(folder, int(amount), rng)
    else:
        concurrent(folder, 4, amount)


if __name__ == "__main__":
    main()
