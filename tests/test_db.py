"""The database, on LanceDB in a folder."""

from __future__ import annotations

import asyncio
import datetime
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm_sidecar import db
from llm_sidecar.db import (
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    Store,
    cli_main,
)
from llm_sidecar.errors import DatabaseUnavailable

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
FEEDBACK: dict[str, Any] = {
    "transaction_id": "t-1",
    "timestamp": NOW,
    "feedback_type": "rating",
    "feedback_content": "good",
}
RUN: dict[str, Any] = {
    "run_id": "r-1",
    "timestamp": NOW,
    "input_query": "Long ABC",
    "final_output": "{}",
    "status": "success",
}
HOSTILE = [
    "'; DROP TABLE phi3_feedback; --",
    'quotes " and \\ and \x00 and \x1b[31m',
    "🚀価格\u202e",
    "line\nbreak\r\n\ttab",
    "x" * 1_000_000,
]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "db")
    yield opened
    await opened.close()


async def test_a_row_comes_back_as_it_went_in(store: Store) -> None:
    corrected = {"ticker": "ABC", "confidence": 0.5}
    await store.append_feedback(FEEDBACK | {"corrected_proposal": corrected})
    await store.log_run(OrchestratorRunSchema(**RUN))
    await store.log_hermes_score({"run_id": "r-1", "timestamp": NOW, "score": 0.25})
    (feedback,) = await store.last("phi3_feedback", 5)
    assert feedback.pop("corrected_proposal") == '{"ticker":"ABC","confidence":0.5}'
    assert len(feedback.pop("feedback_id")) == 64
    assert feedback == FEEDBACK | {"schema_version": "1.0"}
    (run,) = await store.last("orchestrator_runs", 5)
    assert run == RUN | {"error_message": None}
    (score,) = await store.last("hermes_scores", 5)
    assert score == {"run_id": "r-1", "timestamp": NOW, "score": 0.25, "rationale": ""}


async def test_an_object_is_stored_as_json(store: Store) -> None:
    await store.append_feedback(FEEDBACK | {"feedback_content": {"stars": 5}})
    (row,) = await store.last("phi3_feedback", 1)
    assert json.loads(row["feedback_content"]) == {"stars": 5}


@pytest.mark.parametrize("text", HOSTILE, ids=["sql", "control", "unicode", "lines", "megabyte"])
async def test_a_hostile_text_is_stored_and_found_as_it_was(store: Store, text: str) -> None:
    run = RUN | {"run_id": text, "input_query": text, "final_output": text, "error_message": text}
    await store.log_run(run)
    await store.append_feedback(
        FEEDBACK
        | {"transaction_id": text, "feedback_content": text, "corrected_proposal": {"why": text}}
    )
    (found,) = await store.last("orchestrator_runs", 1)
    assert found == run
    assert await store.recent_corrections(1) == [(text, {"why": text}, text)]


@pytest.mark.parametrize(
    "written",
    [
        NOW.replace(tzinfo=None),
        NOW.astimezone(datetime.timezone(datetime.timedelta(hours=5))),
        "2026-01-02T03:04:05.678901",
        "2026-01-02T05:04:05.678901+02:00",
    ],
)
async def test_every_timestamp_is_kept_as_utc(store: Store, written: Any) -> None:
    await store.log_run(RUN | {"timestamp": written})
    (row,) = await store.last("orchestrator_runs", 1)
    assert row["timestamp"] == NOW


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
def test_a_row_without_a_timestamp_is_of_now(given: dict[str, Any]) -> None:
    before = datetime.datetime.now(datetime.UTC)
    made = HermesScoreSchema(run_id="r", score=1.0, **given).timestamp
    assert before <= made <= datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize(
    "changes",
    [
        {"feedback_type": "shout"},
        {"transaction_id": ""},
        {"timestamp": "noon"},
        {"timestamp": "0001-01-01T00:00:00+05:00"},
        {"feedback_content": 3},
        {"feedback_content": {"when": NOW}},
        {"corrected_proposal": {"confidence": float("nan")}},
        {"other": 1},
    ],
)
async def test_a_dict_that_is_no_row_is_refused(store: Store, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        await store.append_feedback(FEEDBACK | changes)


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_outside_0_to_1_is_refused(score: float) -> None:
    with pytest.raises(ValidationError):
        HermesScoreSchema(run_id="r", score=score)


async def test_the_last_rows_come_newest_first(store: Store) -> None:
    for minute in (3, 1, 2):
        when = NOW + datetime.timedelta(minutes=minute)
        await store.log_run(RUN | {"run_id": str(minute), "timestamp": when})
    assert [row["run_id"] for row in await store.last("orchestrator_runs", 2)] == ["3", "2"]
    assert [row["run_id"] for row in await store.last("orchestrator_runs", 0)] == ["3", "2", "1"]


async def test_many_callers_at_once_lose_nothing(store: Store) -> None:
    rows = [HermesScoreSchema(run_id=str(number), score=0.5) for number in range(200)]
    await asyncio.gather(*map(store.log_hermes_score, rows))
    found = await store.last("hermes_scores", 0)
    assert sorted(int(row["run_id"]) for row in found) == list(range(200))


async def test_feedback_delivered_twice_is_one_row(store: Store, tmp_path: Path) -> None:
    await asyncio.gather(*(store.append_feedback(FEEDBACK) for _ in range(3)))
    await store.append_feedback(FEEDBACK)
    other_process = await Store.open(tmp_path / "db")
    await other_process.append_feedback(FEEDBACK)
    await other_process.append_feedback(FEEDBACK | {"feedback_type": "human_edit"})
    await other_process.close()
    rows = await store.last("phi3_feedback", 0)
    assert sorted(row["feedback_type"] for row in rows) == ["human_edit", "rating"]


def _append_the_same(folder: Path, number: int, rounds: int, barrier: Any) -> None:
    """One of several processes that store the same feedback at the same moment."""

    async def append() -> None:
        store = await Store.open(folder)
        for turn in range(rounds):
            barrier.wait(30)
            # Each gives it a time of its own, as sidecars do that hear it without one.
            when = NOW + datetime.timedelta(seconds=number)
            await store.append_feedback(
                FEEDBACK | {"timestamp": when, "feedback_id": f"published-{turn}"}
            )
        await store.close()

    asyncio.run(append())


async def test_processes_that_store_the_same_feedback_at_once_store_it_once(tmp_path: Path) -> None:
    await (await Store.open(tmp_path)).close()
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    processes = [
        spawn.Process(target=_append_the_same, args=(tmp_path, number, 10, barrier))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join, 60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = await Store.open(tmp_path)
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert sorted(row["feedback_id"] for row in rows) == [f"published-{n}" for n in range(10)]


async def test_different_feedback_in_the_same_second_is_two_rows(store: Store) -> None:
    for content in ("the stop is too tight", "so is the target"):
        await store.append_feedback(FEEDBACK | {"feedback_content": content})
    assert len(await store.last("phi3_feedback", 0)) == 2


async def test_a_write_that_never_ends_holds_up_no_other_and_no_shutdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.db.store._CALL_SECONDS", 0.2)
    store = await Store.open(tmp_path / "db")
    add = store._add

    async def add_unless_a_run(table: str, values: list[dict[str, Any]]) -> None:
        if table == "orchestrator_runs":
            await asyncio.Event().wait()
        await add(table, values)

    monkeypatch.setattr(store, "_add", add_unless_a_run)
    with pytest.raises(DatabaseUnavailable, match=r"longer than 0\.2 s"):
        await store.log_run(RUN)
    monkeypatch.setattr("llm_sidecar.db.store._CALL_SECONDS", 5.0)
    await store.log_hermes_score({"run_id": "r-1", "score": 0.5})
    async with asyncio.timeout(5):
        await store.close()


async def test_the_mean_score_is_that_of_the_time_asked_for(store: Store) -> None:
    assert await store.mean_score_since(NOW) == (None, 0)
    for hours, score in ((-30, 0.0), (-23, 0.2), (0, 0.6)):
        when = NOW + datetime.timedelta(hours=hours)
        await store.log_hermes_score({"run_id": "r", "timestamp": when, "score": score})
    mean, number = await store.mean_score_since(NOW - datetime.timedelta(hours=24))
    assert mean == pytest.approx(0.4)
    assert number == 2


async def test_corrections_come_with_the_prompt_they_correct(store: Store) -> None:
    for number in range(3):
        when = NOW + datetime.timedelta(minutes=number)
        name = f"t-{number}"
        await store.log_run(RUN | {"run_id": name, "input_query": f"prompt {number}"})
        await store.append_feedback(
            FEEDBACK
            | {"transaction_id": name, "timestamp": when, "corrected_proposal": {"n": number}}
        )
    await store.append_feedback(FEEDBACK | {"transaction_id": "t-1"})
    await store.append_feedback(
        FEEDBACK | {"transaction_id": "nobody's", "corrected_proposal": {"n": 9}}
    )
    later = NOW + datetime.timedelta(hours=1)
    await store.append_feedback(
        FEEDBACK | {"transaction_id": "t-0", "timestamp": later, "corrected_proposal": {"n": 10}}
    )
    assert await store.recent_corrections(2) == [
        ("prompt 0", {"n": 10}, "t-0"),
        ("prompt 2", {"n": 2}, "t-2"),
    ]


async def test_a_database_that_goes_away_is_said_to_be_and_comes_back(
    store: Store, tmp_path: Path
) -> None:
    await store.log_run(RUN)
    (tmp_path / "db").rename(tmp_path / "moved")
    (tmp_path / "db").write_text("in the way")
    with pytest.raises(DatabaseUnavailable, match="not known to be stored") as caught:
        await store.log_run(RUN)
    assert caught.value.retry_after
    with pytest.raises(DatabaseUnavailable, match="cannot be read"):
        await store.last("orchestrator_runs", 1)
    (tmp_path / "db").unlink()
    (tmp_path / "moved").rename(tmp_path / "db")
    await store.log_run(RUN)
    assert len(await store.last("orchestrator_runs", 0)) == 2


async def test_closing_writes_what_waits(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "db")
    writing = [asyncio.create_task(store.log_run(RUN | {"run_id": str(n)})) for n in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*writing)
    with pytest.raises(DatabaseUnavailable, match="closed"):
        await store.log_run(RUN)
    store = await Store.open(tmp_path / "db")
    assert len(await store.last("orchestrator_runs", 0)) == 20
    await store.close()


# For scripts


def test_scripts_write_models_and_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    db.init_db()
    db.append_feedback(Phi3FeedbackSchema(**FEEDBACK))
    db.append_feedback(FEEDBACK)
    db.log_run(RUN)
    db.log_hermes_score({"run_id": "r-1", "score": 0.5})

    async def counts() -> list[int]:
        store = await Store.open(tmp_path / "db")
        found = [len(await store.last(table, 0)) for table in db.TABLES]
        await store.close()
        return found

    assert asyncio.run(counts()) == [1, 1, 1]


# Command line


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
            await store.log_run(RUN | {"run_id": f"run-{number}", "timestamp": when})
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


def test_a_hundred_rows_are_written_in_less_than_a_hundred_commits(tmp_path: Path) -> None:
    async def write() -> None:
        store = await Store.open(tmp_path)
        rows = [HermesScoreSchema(run_id=str(number), score=0.5) for number in range(100)]
        await asyncio.gather(*map(store.log_hermes_score, rows))
        await store.close()

    asyncio.run(write())
    assert len(list((tmp_path / "hermes_scores.lance" / "data").iterdir())) < 20
