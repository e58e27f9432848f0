"""`python -m llm_sidecar.db`."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_sidecar import db
from llm_sidecar.db import Store, cli_main
from tests.test_db import NOW, RUN, run

ROOT = Path(__file__).resolve().parent.parent


def run_cli(uri: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm_sidecar.db", *arguments],
        env=os.environ | {"LANCEDB_URI": str(uri), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "db"

    async def fill() -> None:
        store = await Store.open(folder)
        for number in range(7):
            when = NOW + datetime.timedelta(minutes=number)
            await store.append(run(run_id=f"run-{number}", timestamp=when))
        await store.close()

    asyncio.run(fill())
    return folder


def test_query_runs_prints_the_last_five_as_json_lines(filled: Path) -> None:
    done = run_cli(filled, "query-runs")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [row["run_id"] for row in rows] == [f"run-{n}" for n in (6, 5, 4, 3, 2)]
    assert rows[0]["timestamp"] == "2026-01-02T03:10:05.678901+00:00"


@pytest.mark.parametrize(("count", "lines"), [("2", 2), ("0", 7), ("-1", 7), (str(10**30), 7)])
def test_query_runs_takes_a_count(filled: Path, count: str, lines: int) -> None:
    assert len(run_cli(filled, "query-runs", "--last", count).stdout.splitlines()) == lines


def test_an_empty_table_says_so(filled: Path) -> None:
    done = run_cli(filled, "query-runs", "--table", "hermes_scores")
    assert done.returncode == 0
    assert "hermes_scores is empty" in done.stdout + done.stderr


def test_no_command_prints_help(tmp_path: Path) -> None:
    done = run_cli(tmp_path)
    assert done.returncode == 0
    assert "query-runs" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["query-runs", "--last", "many"], ["query-runs", "--table", "users"]],
)
def test_bad_arguments_are_one_line_and_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    done = run_cli(tmp_path, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_looking_for_a_database_that_is_not_there_creates_none(tmp_path: Path) -> None:
    done = run_cli(tmp_path / "nowhere", "query-runs")
    assert done.returncode == 1
    assert "There is no database" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_looking_into_an_empty_folder_creates_no_table(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "query-runs")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_table_in_which_nothing_steers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    db.log_run(RUN | {"input_query": "red \x1b[31m\n" + "x" * 100})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli_main(["query-runs"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "run_id", "timestamp", "input_query", "final_output", "status", "error_message",
    ]  # fmt: skip
    assert "\\x1b[31m\\n" in row
    assert "\x1b" not in row
    assert "x" * 50 not in row


def test_a_reader_that_has_seen_enough_is_no_error(filled: Path) -> None:
    command = f"{sys.executable} -m llm_sidecar.db query-runs --last 0 | head -c 1 >&2"
    environ = os.environ | {"LANCEDB_URI": str(filled), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == "{"
