"""Processes that write to one database and are killed in the middle of it.

Run as a program, it imports lancedb once and forks a process for each turn, so that fifty kills
take seconds: forking is safe as long as this process has used nothing of lancedb. What every
process has been told to be stored comes back through a pipe.
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

import lancedb  # noqa: F401 each process would take seconds to import it
import pyarrow  # noqa: F401 the same

from llm_sidecar.db import (
    FEEDBACK,
    RUNS,
    SCORES,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    Store,
    compaction,
    writer,
)
from llm_sidecar.db.log import segments
from llm_sidecar.db.verify import verify

_CALLERS = 8


def hurry() -> None:
    """Moves and compacts all the time, so that kills meet both."""
    hurried = (
        (writer, "_MOVE_EVERY", 0.02),
        (compaction, "_PAUSE", 0.05),
        (compaction, "_SHARE", 1.0),
        (compaction, "FRAGMENTS", 3),
    )
    for module, name, value in hurried:
        assert hasattr(module, name)
        setattr(module, name, value)


def row(name: str, number: int) -> Phi3FeedbackSchema | OrchestratorRunSchema | HermesScoreSchema:
    """One row of one of three tables, with a name of its own."""
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


async def write_for_ever(folder: Path, name: str, told: int, seconds: float) -> None:
    """Appends with several callers, and writes the key of each acknowledged row to `told`."""
    store = Store(folder)
    store.start()
    end = time.monotonic() + seconds

    async def caller(first: int) -> None:
        number = first
        while time.monotonic() < end:
            await store.append(row(name, number))
            os.write(told, f"{name}-{number}\n".encode())
            number += _CALLERS

    await asyncio.gather(*(caller(number) for number in range(_CALLERS)))
    await store.close()


async def check(folder: Path, acknowledged: list[str], exact: bool) -> None:
    """Opens the database; every acknowledged row must be there, and none twice.

    With `exact` nothing else may be there.
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
    doubled = [key for key, count in found.items() if count > 1]
    assert not doubled, f"doubled: {doubled[:5]}"
    assert not exact or len(found) == len(acknowledged), f"{len(found)} of {len(acknowledged)}"


def run_writer(folder: Path, name: str, told: int, seconds: float) -> None:
    hurry()
    asyncio.run(write_for_ever(folder, name, told, seconds))


def run_check(folder: Path, acknowledged: list[str], exact: bool = False) -> None:
    asyncio.run(check(folder, acknowledged, exact))


def say(**result: Any) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


def forked(work: Callable[[], Any]) -> int:
    """Runs `work` in a new process; returns its id."""
    with warnings.catch_warnings():
        # lancedb warns of forks after its use.
        warnings.simplefilter("ignore", RuntimeWarning)
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:  # noqa: BLE001 the exit status and this line are all there is
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def ended_well(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def write_and_kill(folder: Path, name: str, seconds: float) -> list[str]:
    """One process that writes until it is killed; the keys of what it was told to be stored."""
    read, told = os.pipe()
    process = forked(partial(run_writer, folder, name, told, 60.0))
    os.close(told)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(read) as pipe:
        # What the pipe holds of a line that the kill has cut off is no acknowledgement.
        return [line.rstrip("\n") for line in pipe if line.endswith("\n")]


def lose_power(folder: Path, rng: random.Random) -> None:
    """Cuts, zeroes or deletes what nobody has synced yet: tables' files that are newer than the
    note of what is synced, and whatever follows the log's last record."""
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
    """Kills a writer again and again; looks at the database now and then, and in the end."""
    acknowledged: list[str] = []
    for number in range(1, rounds + 1):
        acknowledged += write_and_kill(folder, f"r{number}", rng.uniform(0.02, 0.5))
        if number % 10 == 0 or number == rounds:
            assert ended_well(forked(partial(run_check, folder, acknowledged)))
    say(kills=rounds, rows=len(acknowledged))


def power_losses(folder: Path, rounds: int, rng: random.Random) -> None:
    """Kills a writer, loses what was not synced, and looks at the database, again and again."""
    acknowledged: list[str] = []
    for number in range(1, rounds + 1):
        acknowledged += write_and_kill(folder, f"r{number}", rng.uniform(0.1, 0.5))
        lose_power(folder, rng)
        assert ended_well(forked(partial(run_check, folder, acknowledged)))
    aside = folder / "_log" / "set_aside"
    count = len(list(aside.iterdir())) if aside.exists() else 0
    say(losses=rounds, rows=len(acknowledged), set_aside=count)


def together(folder: Path, processes: int, seconds: float) -> None:
    """Several processes append at once and end by themselves."""
    read, told = os.pipe()
    writers = [
        forked(partial(run_writer, folder, f"p{number}", told, seconds))
        for number in range(processes)
    ]
    os.close(told)
    with os.fdopen(read) as pipe:
        acknowledged = pipe.read().splitlines()
    ended = [ended_well(process) for process in writers]
    assert all(ended)
    assert ended_well(forked(partial(run_check, folder, acknowledged, exact=True)))
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
        together(folder, 4, amount)


if __name__ == "__main__":
    main()
