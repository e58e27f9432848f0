"""The database on an object store: a local S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import boto3
import pytest

from llm_sidecar.db import HermesScoreSchema, Phi3FeedbackSchema, Store, mover, store
from llm_sidecar.errors import DatabaseUnavailable
from tests.integration.test_db_mover import until

SCORES = "hermes_scores"
BUCKET = "osiris"


def score(name: str) -> HermesScoreSchema:
    return HermesScoreSchema(run_id=name, score=0.5)


class S3Server:
    """A server in a separate process, so that it can be stopped and killed."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def wait(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), 1).close()
                    return
                await asyncio.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


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
    await running.wait()
    environ = {
        "AWS_ENDPOINT_URL": running.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LANCEDB_LOG_DIR": str(tmp_path / "log"),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    await asyncio.to_thread(client.create_bucket, Bucket=BUCKET)
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
