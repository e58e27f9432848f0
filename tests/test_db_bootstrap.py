"""Opening a database for the first time, and failing to open one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.db import TABLES, OrchestratorRunSchema, Store, init_db, log_run
from llm_sidecar.errors import DatabaseUnavailable
from tests.test_db import run_processes

ROOT = Path(__file__).resolve().parent.parent
RUN: dict[str, Any] = {"run_id": "r", "input_query": "q", "final_output": "", "status": "success"}


async def test_the_first_opening_creates_folder_and_tables(tmp_path: Path) -> None:
    folder = tmp_path / "missing" / "parents" / "db"
    store = await Store.open(folder)
    assert [await store.last(table, 0) for table in TABLES] == [[]] * len(TABLES)
    assert store.status()["state"] == "open"
    await store.close()
    names = [path.name for path in folder.iterdir()]
    assert sorted(names) == sorted(["_log", *(f"{table}.lance" for table in TABLES)])


async def test_the_second_opening_keeps_the_rows(tmp_path: Path) -> None:
    for _ in range(2):
        store = await Store.open(tmp_path)
        await store.append(OrchestratorRunSchema(**RUN))
        await store.close()
    store = await Store.open(tmp_path)
    assert len(await store.last("orchestrator_runs", 0)) == 2
    await store.close()


def test_init_db_may_run_twice(tmp_path: Path) -> None:
    for _ in range(2):
        init_db(str(tmp_path / "db"))
    assert (tmp_path / "db" / "hermes_scores.lance").is_dir()


def _log_a_run(folder: Path, number: int, barrier: Barrier) -> None:
    barrier.wait(30)
    log_run(RUN | {"run_id": str(number)}, uri=str(folder))


def test_processes_that_create_it_at_once_all_succeed(tmp_path: Path) -> None:
    assert run_processes(_log_a_run, tmp_path / "db") == [0, 0, 0]

    async def names() -> list[str]:
        store = await Store.open(tmp_path / "db")
        rows = await store.last("orchestrator_runs", 0)
        await store.close()
        return sorted(row["run_id"] for row in rows)

    assert asyncio.run(names()) == ["0", "1", "2"]


async def test_an_impossible_location_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatabaseUnavailable, match="cannot be opened") as caught:
        await Store.open(tmp_path / "file" / "db")
    assert "LANCEDB_URI" in caught.value.detail
    assert "\n" not in caught.value.detail


async def test_an_object_store_that_does_not_respond_fails_at_the_deadline(tmp_path: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    uri = "s3://key:secret@bucket/db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCEDB_LOG_DIR", str(tmp_path))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "k")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        patch.setenv("AWS_REGION", "us-east-1")
        with pytest.raises(DatabaseUnavailable) as caught:
            await Store.open(uri, timeout=1.0)
    silent.close()
    assert "secret" not in caught.value.detail


def test_importing_the_package_imports_neither_lancedb_nor_pyarrow() -> None:
    script = "import json, sys, llm_sidecar.db; print(json.dumps(list(sys.modules)))"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environ)
    assert not {"lancedb", "pyarrow"} & set(json.loads(printed))


def test_opening_a_database_imports_no_rest_client(tmp_path: Path) -> None:
    script = """
import asyncio, json, sys
from llm_sidecar.db.store import Store

async def main():
    store = await Store.open(sys.argv[1])
    await store.close()

asyncio.run(main())
print(json.dumps(list(sys.modules)))
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LANCEDB_LOG_DIR": str(tmp_path / "log")}
    command = [sys.executable, "-c", script, str(tmp_path / "db")]
    modules = set(json.loads(subprocess.check_output(command, env=environ)))
    assert "lancedb" in modules
    package = "lance_namespace_urllib3_client."
    assert all(name.startswith(f"{package}models") for name in modules if name.startswith(package))
