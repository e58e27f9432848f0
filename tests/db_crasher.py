"""Processes that write to one database and are killed, or lose power, while they write.

Run as a program, it imports lancedb once and forks a process for each round, so that fifty kills
take seconds. Forking is safe as long as this process has not used lancedb. Each process has 16
callers and a relay, and reports through a pipe what was acknowledged and sent:

    A <key>     the transaction of this key: a row, an event and the response of a request
    E <key>     the relay has sent the event of this key, to a stream that survives everything
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lancedb  # noqa: F401 otherwise each process would import it, which takes seconds
import pyarrow  # noqa: F401 the same

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.db import (
    FEEDBACK,
    RUNS,
    SCORES,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    Store,
    compaction,
    lance,
    mover,
)
from llm_sidecar.db import store as store_module
from llm_sidecar.db.transaction import Progress, RequestKey, Transaction
from llm_sidecar.db.verify import verify
from llm_sidecar.journal import writer
from tests import power_loss

_CALLERS = 16
_WAITING = 0.7
"""The share of processes that start to commit after LanceDB is open, so that kills interrupt
moves."""


@dataclass(slots=True)
class Reports:
    """What the processes reported.

    Attributes:
        acknowledged: keys of transactions.
        sent: keys of events, in the order of the stream; some twice.
    """

    acknowledged: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Adds the reports of a process. A line that its kill has truncated does not count."""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                kind, key = line.split()
                (self.acknowledged if kind == "A" else self.sent).append(key)


def shorten_pauses() -> None:
    """Makes moves, compactions and cleanups so frequent that kills interrupt all of them."""
    shortened = (
        (mover, "_MOVE_EVERY", 0.02),
        (compaction, "_PAUSE", 0.05),
        (compaction, "_SHARE", 1.0),
        (compaction, "FRAGMENTS", 3),
        (lance, "_KEEP_VERSIONS", type(lance._KEEP_VERSIONS)(milliseconds=500)),
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


async def commit(store: Store, name: str, number: int) -> None:
    """A row, an event and a response, all of one key. Every fourth row was a draft before."""
    key = f"{name}-{number}"
    request = RequestKey("", key)
    await store.claim(request, key)
    if number % 4 == 0:
        draft = HermesScoreSchema(run_id=f"draft-{key}", score=0.5)
        progress = Progress(request, state="half")
        await store.commit(Transaction(rows=(draft,), draft=key, progress=progress))
    event = CloudEvent("t", key, "s", "d", id=key)
    progress = Progress(request, response=key.encode())
    await store.commit(Transaction((row(name, number),), (event,), progress, replaces=key))


async def send(store: Store, say: Callable[[str], None]) -> None:
    """Sends events as the relay does."""
    while True:
        await store.outbox.filled.wait()
        store.outbox.filled.clear()
        async with store.outbox.sending() as mine:
            while mine and (queued := await store.outbox.head(16)):
                for one in queued:
                    say(f"E {one.event.id}\n")
                await store.outbox.sent(queued[-1].number)


async def write(folder: Path, name: str, pipe: int, seconds: float) -> None:
    """Commits with several callers, and reports what is acknowledged and sent."""
    rng = random.Random(name)
    store = Store(folder)
    store.start()
    if rng.random() < _WAITING:
        await store.opened()
    end = time.monotonic() + seconds

    def say(line: str) -> None:
        os.write(pipe, line.encode())

    async def caller(number: int) -> None:
        while time.monotonic() < end:
            await commit(store, name, number)
            say(f"A {name}-{number}\n")
            number += _CALLERS

    relay = asyncio.create_task(send(store, say))
    await asyncio.gather(*map(caller, range(_CALLERS)))
    relay.cancel()
    await asyncio.wait([relay])
    await store.close()


async def check(folder: Path, reports: Reports, exact: bool) -> None:
    """Opens the database and asserts that everything acknowledged is in it exactly once.

    Args:
        exact: whether it must have no other rows.
    """
    store = await Store.open(folder)
    try:
        results = await verify(await store.moved(), lambda _: None)
        assert all(result.is_sound for result in results), results
        columns = {FEEDBACK: "transaction_id", RUNS: "run_id", SCORES: "run_id"}
        found: Counter[str] = Counter()
        for table, column in columns.items():
            found.update(line[column] for line in await store.last(table, 0))
        sent = reports.sent + [queued.event.id for queued in await store.outbox.head(1_000_000)]
        claims = await asyncio.gather(
            *(store.claim(RequestKey("", key), key) for key in reports.acknowledged)
        )
    finally:
        await store.close()
    lost = set(reports.acknowledged) - set(found)
    assert not lost, f"lost {len(lost)} of {len(reports.acknowledged)}: {sorted(lost)[:5]}"
    duplicates = [key for key, count in found.items() if count > 1]
    assert not duplicates, f"duplicates: {duplicates[:5]}"
    drafts = [key for key in found if key.startswith("draft")]
    assert not drafts, f"drafts: {drafts[:5]}"
    assert not exact or len(found) == len(reports.acknowledged)
    unsent = set(reports.acknowledged) - set(sent)
    assert not unsent, f"lost {len(unsent)} events: {sorted(unsent)[:5]}"
    _check_order(sent)
    wrong = [
        key
        for key, claim in zip(reports.acknowledged, claims, strict=True)
        if claim.response != key.encode()
    ]
    assert not wrong, f"{len(wrong)} requests have no response: {wrong[:5]}"


def _check_order(sent: list[str]) -> None:
    """Asserts that each caller's events were first sent in the order of its commits."""
    last: dict[tuple[str, int], int] = {}
    for key in dict.fromkeys(sent):
        name, _, number = key.partition("-")
        caller = (name, int(number) % _CALLERS)
        assert last.get(caller, -1) < int(number), f"{key} was sent after a later event"
        last[caller] = int(number)


def run_writer(
    folder: Path, name: str, pipe: int, seconds: float, undo: Path | None = None
) -> None:
    shorten_pauses()
    if undo is not None:
        power_loss.start(folder, undo)
    asyncio.run(write(folder, name, pipe, seconds))


def run_check(folder: Path, reports: Reports, exact: bool = False) -> None:
    asyncio.run(check(folder, reports, exact))


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


def write_and_kill(
    folder: Path, name: str, seconds: float, reports: Reports, undo: Path | None = None
) -> None:
    """Kills a writing process some seconds after its first acknowledgement."""
    read, pipe = os.pipe()
    process = forked(partial(run_writer, folder, name, pipe, 60.0, undo))
    os.close(pipe)
    first = os.read(read, 1)
    assert first, "it ended before it was killed"
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(read) as lines:
        reports.add(first.decode() + lines.read())


def kills(folder: Path, rounds: int, rng: random.Random) -> None:
    """Kills a writer in each round; checks the database after every tenth and after the last."""
    reports = Reports()
    for number in range(1, rounds + 1):
        write_and_kill(folder, f"r{number}", rng.uniform(0.0, 0.6), reports)
        if number % 10 == 0 or number == rounds:
            assert succeeded(forked(partial(run_check, folder, reports)))
    say(kills=rounds, rows=len(reports.acknowledged))


def power_losses(folder: Path, rounds: int, rng: random.Random) -> None:
    """In each round, kills a writer, undoes what it has not synced, and checks the database."""
    reports, undone = Reports(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rounds):
        undo, before = folder.with_name("undo"), set(folder.resolve().rglob("*"))
        write_and_kill(folder, f"r{number}", rng.uniform(0.0, 0.6), reports, undo)
        undone += power_loss.lose_power(folder, undo, rng, before)
        assert succeeded(forked(partial(run_check, folder, reports)))
    say(losses=rounds, rows=len(reports.acknowledged), undone=undone)


def concurrent(folder: Path, processes: int, seconds: float) -> None:
    """Several processes commit at the same time and end normally."""
    read, pipe = os.pipe()
    writers = [
        forked(partial(run_writer, folder, f"p{number}", pipe, seconds))
        for number in range(processes)
    ]
    os.close(pipe)
    reports = Reports()
    with os.fdopen(read) as lines:
        reports.add(lines.read())
    results = [succeeded(process) for process in writers]
    assert all(results)
    assert succeeded(forked(partial(run_check, folder, reports, exact=True)))
    say(processes=processes, rows=len(reports.acknowledged))


def main() -> None:
    # This does not test deadlines, and the machine may be busy.
    writer._COMMIT_SECONDS = store_module._QUERY_SECONDS = 60.0  # type: ignore[misc]
    what, folder, amount, seed = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    rng = random.Random(seed)
    if what == "kills":
        kills(folder, int(amount), rng)
    elif what == "once":
        reports = Reports()
        write_and_kill(folder, "r", amount, reports)
        say(keys=reports.acknowledged)
    elif what == "power":
        power_losses(folder, int(amount), rng)
    else:
        concurrent(folder, 4, amount)


if __name__ == "__main__":
    main()
