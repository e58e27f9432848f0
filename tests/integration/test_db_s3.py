"""The database on an object store: a local S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from llm_sidecar.db import (
    FEEDBACK,
    TABLES,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    Store,
    cli_main,
    lance,
    mover,
    store,
)
from llm_sidecar.db.lance import connect
from llm_sidecar.db.location import location_of
from llm_sidecar.db.rows import RUNS
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal import rows
from tests.integration.test_db_mover import until
from tests.live_server import ROOT
from tests.s3_server import BUCKET, S3Server

SCORES = "hermes_scores"


def score(name: str) -> HermesScoreSchema:
    return HermesScoreSchema(run_id=name, score=0.5)


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.end()


@pytest.fixture
async def uri(
    running: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """An address in an empty bucket, with the usual variables set."""
    for name, value in running.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path / "log"))
    await running.create_bucket()
    yield f"s3://{BUCKET}/{tmp_path.name}"
    running.send(signal.SIGCONT)


async def test_rows_are_stored_queried_and_compacted(uri: str, tmp_path: Path) -> None:
    store = await Store.open(uri)
    for number in range(3):
        await store.append(score(str(number)))
        assert len(await store.last(SCORES, 0)) == number + 1
    feedback = Phi3FeedbackSchema(transaction_id="1", feedback_type="rating", feedback_content="5")
    for _ in range(2):
        await store.append(feedback)
    found = await store.transaction("1")
    assert [len(rows) for rows in found.values()] == [1, 0, 1, 0, 0]
    assert await store.compact()
    assert store.status()["fragments"][SCORES] == 1
    assert len(await store.last(SCORES, 0)) == 3
    await store.close()
    # The journal of an object store is on this machine, and empty when all rows are stored.
    assert store.status()["rows_waiting"] == 0
    assert len(list((tmp_path / "log").glob("*/journal.sqlite3"))) == 1


async def test_two_concurrent_writers_lose_and_duplicate_no_row(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await Store.open(uri)
    monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path / "of another machine"))
    other = await Store.open(uri)
    for turn in range(3):
        await asyncio.gather(
            *(s.append(score(f"{name}-{turn}-{n}"))
              for name, s in (("one", one), ("other", other)) for n in range(5))
        )  # fmt: skip
        await asyncio.gather(one.last(SCORES, 1), other.last(SCORES, 1))
    rows = [row["run_id"] for row in await one.last(SCORES, 0)]
    assert sorted(rows) == sorted(
        f"{name}-{turn}-{n}" for name in ("one", "other") for turn in range(3) for n in range(5)
    )
    await one.close()
    await other.close()


async def test_the_id_of_the_database_is_known_before_it_is_open(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other machines recognise feedback by it, and know no other id of this one."""

    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = Store(uri)
    store.start()
    # The first start waits for it.
    name = await store.id()
    await store.opened(10.0)
    assert name == store._mover.database_id
    await store.close()
    monkeypatch.setattr(mover, "open_tables", fail)
    again = Store(uri)
    again.start()
    assert await again.id() == name
    assert again.has_id(name)
    await again.close()


async def test_a_draft_is_dropped_if_another_machine_has_finished_its_run(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: uuid.UUID, status: str) -> OrchestratorRunSchema:
        return OrchestratorRunSchema(
            run_id=str(name), input_query="p", final_output="{}", status=status
        )

    finished, unfinished = uuid.uuid4(), uuid.uuid4()
    one = await Store.open(uri)
    monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path / "of another machine"))
    other = await Store.open(uri)
    for name in (finished, unfinished):
        await one.commit(Transaction([run(name, "partial")], draft=str(name)))
    await other.append(run(finished, "success").keyed(finished.hex))
    await other.last(RUNS, 0)
    monkeypatch.setattr(rows, "DRAFT_SECONDS", 0.0)
    found = [(row["run_id"], row["status"]) for row in await one.last(RUNS, 0)]
    assert sorted(found) == sorted([(str(finished), "success"), (str(unfinished), "partial")])
    assert one.status()["rows_waiting"] == 0
    await one.close()
    await other.close()


async def test_a_server_that_hangs_and_recovers_loses_and_duplicates_no_row(
    uri: str, running: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_QUERY_SECONDS", 1.0)
    monkeypatch.setattr(mover, "_STALLED_SECONDS", 1.0)
    opened = await Store.open(uri)
    running.send(signal.SIGSTOP)
    # The row is acknowledged, because it is in the journal.
    async with asyncio.timeout(2):
        await opened.append(score("logged"))
    with pytest.raises(DatabaseUnavailable, match="longer than 1 s"):
        await opened.last(SCORES, 1)
    await until(lambda: opened.status()["state"] == "away")
    running.send(signal.SIGCONT)
    monkeypatch.setattr(store, "_QUERY_SECONDS", 30.0)
    await until(lambda: not opened.status()["rows_waiting"], 60)
    assert [row["run_id"] for row in await opened.last(SCORES, 0)] == ["logged"]
    assert opened.status()["state"] == "open"
    await opened.close()


async def test_rows_left_in_the_journal_are_moved_by_the_next_process(
    uri: str, running: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_CLOSE_SECONDS", 0.5)
    opened = await Store.open(uri)
    await opened.append(score("early"))
    await opened.last(SCORES, 1)
    running.send(signal.SIGSTOP)
    never_open = Store(uri)
    never_open.start()
    await never_open.append(score("late"))
    async with asyncio.timeout(5):
        await never_open.close()
    running.send(signal.SIGCONT)
    await opened.close()
    again = await Store.open(uri)
    assert sorted(row["run_id"] for row in await again.last(SCORES, 0)) == ["early", "late"]
    await again.close()


# Several machines


def writers(uri: str, tmp_path: Path, *, batches: int) -> None:
    """Lets two processes store the same 500 rows of feedback at the same time."""
    found = []
    for name in ("one", "other"):
        environ = os.environ | {"LANCEDB_LOG_DIR": str(tmp_path / name)}
        command = [sys.executable, "-m", "tests.db_writer", uri, "500", str(batches)]
        found.append(
            subprocess.Popen(
                command, env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
    try:
        for process in found:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
        for process in found:
            process.communicate(b"\n", timeout=60)
        assert [process.returncode for process in found] == [0, 0]
    finally:
        for process in found:
            process.kill()
            process.wait()


async def feedback_ids(uri: str) -> Counter[str]:
    opened = await Store.open(uri)
    try:
        return Counter(row["feedback_id"] for row in await opened.last(FEEDBACK, 0))
    finally:
        await opened.close()


async def old_feedback(uri: str) -> None:
    """Creates the table of feedback as version 0.1.0 did, with one row."""
    connection = await connect(location_of(uri), create=True)
    row = {
        "transaction_id": "old",
        "timestamp": "2026-01-02T03:04:05.678901Z",
        "feedback_type": "rating",
        "feedback_content": "good",
    }
    await connection.create_table(FEEDBACK, data=pa.Table.from_pylist([row]))
    connection.close()


@pytest.mark.parametrize("is_migrated", [False, True])
async def test_two_machines_that_store_the_same_500_rows_store_each_once(
    uri: str,
    tmp_path: Path,
    is_migrated: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = Counter(str(number) for number in range(500))
    if is_migrated:
        await old_feedback(uri)
        monkeypatch.setenv("LANCEDB_URI", uri)
        assert await asyncio.to_thread(cli_main, ["migrate"]) == 1
        assert "then add --alone" in capsys.readouterr().err
        assert await asyncio.to_thread(cli_main, ["migrate", "--alone"]) == 0
        (old,) = await feedback_ids(uri)
        expected[old] = 1
    await asyncio.to_thread(writers, uri, tmp_path, batches=5)
    assert await feedback_ids(uri) == expected


async def test_two_machines_that_compact_at_once_lose_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await Store.open(uri)
    monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path / "of another machine"))
    other = await Store.open(uri)
    for number in range(4):
        await one.append(score(f"one-{number}"))
        await one.last(SCORES, 1)
        await other.append(score(f"other-{number}"))
        await other.last(SCORES, 1)
    # As without Redis, which has the lease.
    done = await asyncio.gather(one.compact(), other.compact(), return_exceptions=True)
    assert True in done
    rows = [row["run_id"] for row in await other.last(SCORES, 0)]
    assert sorted(rows) == sorted(f"{m}-{n}" for m in ("one", "other") for n in range(4))
    for opened in (one, other):
        await opened.close()


async def test_machines_that_start_at_once_create_each_table_once(uri: str, tmp_path: Path) -> None:
    alone, arrived = asyncio.Lock(), []

    @contextlib.asynccontextmanager
    async def lease() -> AsyncIterator[None]:
        # As a sidecar's.
        arrived.append(1)
        async with alone:
            yield

    await alone.acquire()
    machines = [Store(uri, log_dir=tmp_path / str(number)) for number in range(4)]
    for machine in machines:
        machine.share(lambda: None, lambda: contextlib.nullcontext(True), lease)
        machine.start()
    await until(lambda: len(arrived) == len(machines))
    connection = await connect(location_of(uri), create=True)
    assert (await connection.list_tables()).tables == []
    alone.release()
    opened = [await machine.opened() for machine in machines]
    assert len({tables.database_id for tables in opened}) == 1
    versions = [len(await opened[0][table].list_versions()) for table in TABLES]
    assert versions == [1] * len(TABLES)
    for machine in machines:
        await machine.close()


async def test_only_the_machine_with_the_lease_compacts(uri: str) -> None:
    @contextlib.asynccontextmanager
    async def of_another() -> AsyncIterator[bool]:
        yield False

    opened = Store(uri)
    opened.share(lambda: None, of_another, contextlib.nullcontext)
    opened.start()
    await opened.opened()
    assert not await opened.compact()
    await opened.close()


async def test_old_versions_stay_for_an_hour(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await Store.open(uri)
    tables = await opened.opened()
    await opened.append(score("1"))
    await opened.last(SCORES, 1)
    monkeypatch.setattr(lance, "_KEEP_VERSIONS", datetime.timedelta(milliseconds=1))
    assert lance._KEEP_VERSIONS_REMOTE.total_seconds() == 3600
    await opened.compact()
    assert len(await tables[SCORES].list_versions()) > 1
    monkeypatch.setattr(lance, "_KEEP_VERSIONS_REMOTE", lance._KEEP_VERSIONS)
    await opened.compact()
    assert len(await tables[SCORES].list_versions()) == 1
    await opened.close()


async def test_feedback_reaches_the_database_soon(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[float] = []
    opened = Store(uri)
    opened.share(
        lambda: moves.append(time.monotonic()),
        lambda: contextlib.nullcontext(True),
        contextlib.nullcontext,
    )
    opened.start()
    await opened.opened()
    began = time.monotonic()
    for number in range(20):
        row = FeedbackWithdrawalSchema(feedback_id=str(number), transaction_id="t")
        await opened.commit(Transaction([row]))
    await until(lambda: moves)
    # All of them in one batch, long before the next regular one.
    assert 0.5 <= moves[0] - began < mover._MOVE_EVERY_REMOTE
    assert len(moves) == 1
    assert opened.status()["rows_waiting"] == 0
    await opened.close()


async def test_a_row_of_another_machine_is_looked_for_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await Store.open(uri)
    monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path / "of another machine"))
    other = await Store.open(uri)
    sent = Phi3FeedbackSchema(
        feedback_id="f", transaction_id="t", feedback_type="rating", feedback_content="5"
    )
    await one.commit(Transaction([sent]))
    assert await other.feedback_transaction("f") == "t"
    monkeypatch.setattr(store, "_ELSEWHERE_SECONDS", 0.0)
    assert await other.feedback_transaction("g") is None
    for opened in (one, other):
        await opened.close()


async def test_a_store_with_conditional_writes_is_safe_for_several_machines(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LANCEDB_URI", uri)
    assert await asyncio.to_thread(cli_main, ["verify", "--writers"]) == 0
    assert capsys.readouterr().out == (
        "8 writers created the same table at once, 20 times: no commit is lost.\n"
    )


async def test_a_store_that_ignores_conditions_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = S3Server(unconditional=True)
    try:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LANCEDB_LOG_DIR", str(tmp_path))
        monkeypatch.setenv("LANCEDB_URI", f"s3://{BUCKET}/db")
        await server.create_bucket()
        assert await asyncio.to_thread(cli_main, ["verify", "--writers"]) == 1
    finally:
        server.end()
    assert "the store ignores If-None-Match" in capsys.readouterr().out
