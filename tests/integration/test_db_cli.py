"""`python -m llm_sidecar.db`."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.cells import cell_len

from llm_sidecar import db
from llm_sidecar.db import (
    FEEDBACK,
    PROPOSALS,
    RUNS,
    SCORES,
    TABLES,
    HermesScoreSchema,
    OrchestratorRunSchema,
    ProposalSchema,
    Store,
    cli_commands,
    cli_main,
    export,
    table_of,
)
from llm_sidecar.db.encoding import encoded
from llm_sidecar.db.tables import COMPACTING
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.locks import locked
from tests.test_db import NOW, PROPOSAL, RUN, feedback, run, score

ROOT = Path(__file__).resolve().parents[2]


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
def test_query_runs_takes_a_count(
    filled: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    count: str,
    lines: int,
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(filled))
    assert len(lines_of(capsys, "query-runs", "--last", count)) == lines


def test_an_empty_table_says_so(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(filled))
    assert cli_main(["query-runs", "--table", "hermes_scores"]) == 0
    assert capsys.readouterr() == ("", "hermes_scores is empty.\n")


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


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_query_creates_no_database(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / name))
    assert cli_main(["query-runs"]) == 1
    reason = f"The database at {tmp_path / name} cannot be opened: There is no database"
    assert capsys.readouterr() == ("", f"{reason}; check LANCEDB_URI.\n")
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_control_characters_are_escaped_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    # An older version stored such characters.
    steering = {"input_query": "red \x1b[31m\n" + "x" * 100}
    db.log_run(OrchestratorRunSchema(**RUN).model_copy(update=steering))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli_main(["query-runs"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "run_id", "timestamp", "input_query", "final_output", "status", "error_message",
    ]  # fmt: skip
    assert "red \\x1b[31m" in row
    assert "\x1b" not in row
    assert "x" * 50 not in row


def test_a_closed_pipe_is_not_an_error(filled: Path) -> None:
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    return tmp_path / "db"


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on standard output of a command that succeeds."""
    capsys.readouterr()
    assert cli_main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def fill_in_pieces(folder: Path, pieces: int) -> None:
    """Stores scores one by one, so that each is a fragment."""

    async def fill() -> None:
        store = await Store.open(folder)
        for number in range(pieces):
            await store.append(score(run_id=str(number)))
            # A query first moves the logged rows.
            await store.last(SCORES, 1)
        await store.close()

    asyncio.run(fill())


# Filters


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "db"
    now = datetime.datetime.now(datetime.UTC)
    ages = {"minute": 1 / 60, "hour": 1, "day": 30, "week": 200}
    rows = [
        *(run(run_id=str(n), timestamp=NOW + datetime.timedelta(minutes=n)) for n in range(3)),
        *(
            run(run_id=name, timestamp=now - datetime.timedelta(hours=hours), status="error")
            for name, hours in ages.items()
        ),
    ]

    async def fill(rows: list[OrchestratorRunSchema]) -> None:
        store = await Store.open(folder)
        await asyncio.gather(*map(store.append, rows))
        await store.close()

    asyncio.run(fill(rows))
    return folder


@pytest.fixture
def mixed(mixed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(mixed_folder))


def ids(lines: list[str]) -> list[str]:
    return [json.loads(line)["run_id"] for line in lines]


@pytest.mark.usefixtures("mixed")
def test_status_selects_runs_with_that_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert ids(lines_of(capsys, "query-runs", "--status", "success")) == ["2", "1", "0"]
    errors = ids(lines_of(capsys, "query-runs", "--status", "error", "--last", "2"))
    assert errors == ["minute", "hour"]


@pytest.mark.usefixtures("mixed", "in_tokyo")
@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("2026-01-02T03:05:05.678901Z", ["2", "1"]),
        ("2026-01-02T03:05:05.678902", ["2"]),
        ("2026-01-02 05:06:05.678901+02:00", ["2"]),
        ("2026-01-02", ["2", "1", "0"]),
        ("20260103", []),
    ],
)
def test_since_accepts_iso_times_that_default_to_utc(
    capsys: pytest.CaptureFixture[str], since: str, expected: list[str]
) -> None:
    lines = lines_of(capsys, "query-runs", "--last", "0", "--status", "success", "--since", since)
    assert ids(lines) == expected


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("30m", ["minute"]),
        ("24h", ["minute", "hour"]),
        ("1.5d", ["minute", "hour", "day"]),
        ("2w", ["minute", "hour", "day", "week"]),
    ],
)
def test_since_accepts_ages(
    capsys: pytest.CaptureFixture[str], since: str, expected: list[str]
) -> None:
    assert ids(lines_of(capsys, "query-runs", "--last", "0", "--since", since)) == expected


@pytest.mark.usefixtures("mixed")
def test_a_query_without_matches_is_reported_apart_from_the_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli_main(["query-runs", "--status", "'; DROP TABLE"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "No row of orchestrator_runs matches.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["query-runs", "--since", since]
        for since in ("", "yesterday", "h", "nand", "infd", "1e30w", "99999999d", "2026-13-01")
    ]
    + [
        ["query-runs", "--since", "0001-01-01T00:00:00+05:00"],
        ["query-runs", "--last"],
        ["query-runs", "--status", "error", "--table", "hermes_scores"],
        ["export"],
        ["export", "--format", "xml"],
        ["export", "--format", "sft", "--since", "soon"],
        ["verify", "everything"],
        ["verify", "two\nlines"],
    ],
)
def test_an_invalid_value_exits_with_2_before_anything_is_opened(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli_main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("command", "holds"),
    [
        ("query-runs", "--since TIME"),
        ("stats", "--format FORMAT"),
        ("compact", "Merge small files"),
        ("migrate", "older version"),
        ("verify", "ids are unique"),
        ("export", "<sft|dpo|jsonl>"),
    ],
)
def test_every_command_has_help(
    capsys: pytest.CaptureFixture[str], command: str, holds: str
) -> None:
    text = " ".join(lines_of(capsys, command, "--help"))
    assert f"Usage: python -m llm_sidecar.db {command}" in text
    assert holds in text
    assert command in " ".join(lines_of(capsys, "--help"))


# Filters on the content of a proposal

ABC: dict[str, Any] = {"ticker": "ABC", "action": "adjust", "confidence": 0.5, "rationale": "x"}


@pytest.fixture(scope="module")
def proposals_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proposals") / "db"
    # Ticker, action, score and model of each, oldest first. Each rationale contains the texts that
    # the filters search for.
    each = [
        ("ABC", "adjust", 0.9, "phi3/a"),
        ("ABC", "pass", 0.4, "phi3/b"),
        ("XYZ", "adjust", 0.9, "phi3/a"),
        ("XYZ", "pass", None, "phi3/a"),
        ("Ü'\"", "abort", 0.2, "phi3/a"),
        ("XYZ", "pass", 0.1, "phi3/a"),
    ]

    async def fill() -> None:
        store = await Store.open(folder)
        for number, (ticker, action, points, model) in enumerate(each):
            rest: dict[str, Any] = {"run_id": f"t-{number}"}
            rest["timestamp"] = NOW + datetime.timedelta(minutes=number)
            proposal = ABC | {"ticker": ticker, "action": action}
            proposal |= {"rationale": ["ABC", "pass"]}
            output = {"proposal": proposal, "assessment": "", "score": points}
            await store.append(run(**rest, final_output=json.dumps(output)))
            rest["transaction_id"] = rest.pop("run_id")
            row = rest | {"prompt": "p", "proposal": proposal, "score": points, "model": model}
            await store.append(ProposalSchema(**row))
            correction = {"feedback_type": "correction", "feedback_content": "x"}
            await store.append(feedback(**rest, **correction, corrected_proposal=proposal))
            if points is not None:
                await store.append(score(run_id=f"t-{number}", timestamp=NOW, score=points))
        await store.last(RUNS, 1)
        await store.close()

    asyncio.run(fill())
    return folder


@pytest.mark.parametrize("table", [RUNS, PROPOSALS, FEEDBACK])
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--ticker", "ABC"], ["t-1", "t-0"]),
        (["--ticker", "ABC", "--last", "1"], ["t-1"]),
        (["--ticker", "ABC", "--last", "2"], ["t-1", "t-0"]),
        (["--ticker", "abc"], []),
        (["--ticker", "Ü'\""], ["t-4"]),
        (["--ticker", "') OR true --"], []),
        (["--action", "adjust"], ["t-2", "t-0"]),
        (["--action", "pass", "--ticker", "ABC", "--last", "0"], ["t-1"]),
        (["--action", "pass", "--last", "2"], ["t-5", "t-3"]),
        (["--since", "2026-01-02T03:05", "--ticker", "ABC"], ["t-1"]),
    ],
)
def test_ticker_and_action_filter_before_the_limit(
    proposals_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: str,
    arguments: list[str],
    found: list[str],
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(proposals_folder))
    rows = map(json.loads, lines_of(capsys, "query-runs", "--table", table, *arguments))
    key = "run_id" if table == RUNS else "transaction_id"
    assert [row[key] for row in rows] == found


@pytest.mark.parametrize(
    ("table", "arguments", "found"),
    [
        (PROPOSALS, ["--min-score", "0.4"], ["t-2", "t-1", "t-0"]),
        (PROPOSALS, ["--min-score", "0.4", "--last", "1"], ["t-2"]),
        (PROPOSALS, ["--min-score", "0", "--model", "phi3/b"], ["t-1"]),
        (PROPOSALS, ["--model", "phi3/a", "--ticker", "ABC"], ["t-0"]),
        (RUNS, ["--min-score", "0.9"], ["t-2", "t-0"]),
        (SCORES, ["--min-score", "0.4"], ["t-0", "t-1", "t-2"]),
    ],
)
def test_score_and_model_select_matching_rows(
    proposals_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: str,
    arguments: list[str],
    found: list[str],
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(proposals_folder))
    rows = [
        json.loads(line) for line in lines_of(capsys, "query-runs", "--table", table, *arguments)
    ]
    names = [row["transaction_id" if table == PROPOSALS else "run_id"] for row in rows]
    assert (sorted(names) if table == SCORES else names) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "--model is for proposals, not for orchestrator_runs."),
        (
            ["--min-score", "0.5", "--table", "phi3_feedback"],
            "--min-score is for orchestrator_runs, hermes_scores, proposals, not for "
            "phi3_feedback.",
        ),
        (
            ["--ticker", "ABC", "--table", "hermes_scores"],
            "--ticker is for orchestrator_runs, phi3_feedback, proposals, not for hermes_scores.",
        ),
    ],
)
def test_a_filter_without_a_column_names_the_tables_that_have_it(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli_main(["query-runs", *arguments]) == 2
    assert capsys.readouterr().err == f"python -m llm_sidecar.db: Invalid value: {message}\n"


@pytest.mark.parametrize("option", ["--status", "--ticker", "--model"])
def test_a_filter_in_another_encoding_is_a_bad_argument(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    # Python decodes the byte FF of a UTF-8 terminal to this character.
    assert cli_main(["query-runs", "--table", "proposals", option, "AB\udcff"]) == 2
    message = f"Invalid value for '{option}': it is not text in the encoding of this terminal."
    assert capsys.readouterr().err == f"python -m llm_sidecar.db: {message}\n"


# Formats


@pytest.fixture
def mixed_rows(folder: Path) -> Path:
    """A proposal and two rows of feedback, one of which begins like a formula."""

    async def fill() -> None:
        store = await Store.open(folder)
        words = {"assessment": '{"looks": "like JSON"}', "prompt": "=1+1", "proposal": ABC}
        unreliable = {"answer_mass": 0.25, "score_reliable": False}
        await store.append(ProposalSchema(**PROPOSAL | words | unreliable))
        await store.append(feedback(feedback_content='a, "b"\nc'))
        later = NOW + datetime.timedelta(minutes=1)
        await store.append(feedback(feedback_content={"a": [1.0, None]}, timestamp=later))
        await store.last(RUNS, 1)
        await store.close()

    asyncio.run(fill())
    return folder


@pytest.mark.usefixtures("mixed_rows")
def test_jsonl_decodes_objects_and_keeps_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (row,) = map(json.loads, lines_of(capsys, "query-runs", "--table", PROPOSALS))
    assert row == {
        "transaction_id": "r-1",
        "timestamp": "2026-01-02T03:04:05.678901+00:00",
        "prompt": "=1+1",
        "proposal": ABC,
        "assessment": '{"looks": "like JSON"}',
        "score": 0.5,
        "model": "phi3",
        "adapter": None,
        "latencies": {"proposal": 0.25, "assessment": 0.5, "score": None},
        "grounded": "ticker,rationale",
        "provenance": {"ticker": "ABC"},
        "answer_mass": 0.25,
        "score_reliable": False,
    }
    rows = map(json.loads, lines_of(capsys, "query-runs", "--table", FEEDBACK))
    assert [row["feedback_content"] for row in rows] == [{"a": [1.0, None]}, 'a, "b"\nc']


@pytest.mark.usefixtures("mixed_rows")
def test_csv_has_a_header_quotes_and_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["query-runs", "--table", PROPOSALS, "--format", "csv"]) == 0
    proposal = json.dumps(ABC, separators=(",", ":")).replace('"', '""')
    latencies = '{""proposal"":0.25,""assessment"":0.5,""score"":null}'
    assert capsys.readouterr().out == (
        "transaction_id,timestamp,prompt,proposal,assessment,score,model,adapter,latencies,"
        "grounded,provenance,answer_mass,score_reliable\r\n"
        f'r-1,2026-01-02T03:04:05.678901+00:00,\'=1+1,"{proposal}",'
        '"{""looks"": ""like JSON""}",0.5,phi3,,'
        f'"{latencies}","ticker,rationale","{{""ticker"":""ABC""}}",0.25,False\r\n'
    )
    assert cli_main(["query-runs", "--table", SCORES, "--format", "csv"]) == 0
    assert capsys.readouterr() == (
        "run_id,timestamp,score,rationale,answer_mass,score_reliable\r\n",
        "hermes_scores is empty.\n",
    )


@pytest.mark.usefixtures("mixed_rows")
def test_parquet_has_the_types_of_the_table(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "out.parquet"
    command = ["query-runs", "--table", PROPOSALS, "--format", "parquet"]
    assert cli_main([*command, "--out", str(out)]) == 0
    assert cli_main(command) == 0
    piped = capsysbinary.readouterr().out
    for source in (out, io.BytesIO(piped)):
        found = parquet.read_table(source)
        (row,) = found.to_pylist()
        assert found.schema.field("timestamp").type == pa.timestamp("us", tz="UTC")
        assert (row["timestamp"], row["prompt"]) == (NOW, "=1+1")
        assert json.loads(row["proposal"]) == ABC
        assert row["latencies"] == {"proposal": 0.25, "assessment": 0.5, "score": None}
        assert "row_id" not in row


@pytest.mark.usefixtures("mixed_rows")
@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_rows_are_written_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    command = ["query-runs", "--table", PROPOSALS, "--format", form]
    assert cli_main(command) == 0
    shown = capsys.readouterr().out
    assert cli_main([*command, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes().decode() == shown
    assert capsys.readouterr() == ("", "")


def test_parquet_is_refused_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, terminal = on_terminal(monkeypatch, "query-runs", "--format", "parquet")
    assert status == 2
    assert terminal.screen() == [
        "python -m llm_sidecar.db: Invalid value: parquet is not for a terminal: use --out FILE or "
        "a pipe."
    ]
    assert not folder.exists()


# Terminals


@pytest.fixture
def long_row(folder: Path) -> str:
    """A prompt with markup, an emoji code, wide characters and a right-to-left mark."""
    prompt = "[red]hot[/red] :smile: 価格 \u202e" + "x" * 300
    row = OrchestratorRunSchema(**RUN | {"run_id": "3f2a9c1e-" * 4})
    db.log_run(row.model_copy(update={"input_query": prompt}))
    return prompt.replace("\u202e", "\\u202e")


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (20, "success"),
        (30, "success"),
        (40, "success"),
        (80, "error_message"),
        (200, "error_message"),
    ],
)
def test_rows_fit_the_terminal(
    long_row: str, monkeypatch: pytest.MonkeyPatch, columns: int, shown: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, terminal = on_terminal(monkeypatch, "query-runs")
    assert status == 0
    lines = terminal.screen()
    assert max(map(cell_len, lines)) <= columns
    text = " ".join(" ".join(lines).split())
    assert "2026-01-02 03:04:05" in text
    assert "[red]hot" in text
    assert shown in text


@pytest.mark.parametrize("columns", [20, 80])
def test_wide_does_not_shorten_values(
    long_row: str, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, terminal = on_terminal(monkeypatch, "query-runs", "--wide")
    assert any(line.endswith(long_row) for line in terminal.screen())
    assert "2026-01-02T03:04:05.678901+00:00" in terminal.getvalue()


@pytest.mark.usefixtures("long_row")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_output_uses_only_characters_of_the_terminals_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    assert cli_main(["query-runs"]) == 0
    text = raw.getvalue().decode(encoding)
    assert max(map(cell_len, text.splitlines())) <= 160
    assert ("価格" in text) is (encoding == "utf-8")
    assert ("\\u4fa1\\u683c" in text) is (encoding != "utf-8")
    assert ("…" in text) is (encoding in ("utf-8", "cp1252"))


# Which database


@pytest.fixture
def no_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, without LANCEDB_URI and without a container's folder."""
    monkeypatch.delenv("LANCEDB_URI", raising=False)
    monkeypatch.setattr(cli_commands, "DEFAULT_LANCEDB_URI", str(tmp_path / "app"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_the_database_of_make_serve_is_found(
    no_variable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    db.init_db(".data/lancedb")
    assert cli_main(["query-runs"]) == 0
    assert capsys.readouterr() == ("", "orchestrator_runs is empty.\n")
    _, terminal = on_terminal(monkeypatch, "query-runs")
    assert terminal.screen() == [
        "LANCEDB_URI is not set; using .data/lancedb.",
        "orchestrator_runs is empty.",
    ]


def test_the_containers_database_comes_first_if_it_holds_a_table(
    no_variable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    container = no_variable / "app"
    db.init_db(".data/lancedb")
    # A server that is started without LANCEDB_URI and stopped at once leaves such a folder.
    (container / "_log").mkdir(parents=True)
    assert cli_main(["query-runs"]) == 0
    assert capsys.readouterr() == ("", "orchestrator_runs is empty.\n")
    db.init_db(str(container))
    db.log_hermes_score({"run_id": "in-the-container", "score": 0.5}, uri=str(container))
    assert cli_main(["query-runs", "--table", "hermes_scores"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == "in-the-container"


def test_a_container_without_a_table_has_no_database(
    no_variable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (no_variable / "app").mkdir()
    assert cli_main(["query-runs"]) == 1
    assert "There is no database" in capsys.readouterr().err


def test_without_any_database_the_variable_is_named(
    no_variable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("query-runs", "stats", "verify", "compact", "migrate"):
        assert cli_main([command]) == 1
        assert capsys.readouterr() == (
            "",
            f"There is no database at {no_variable / 'app'} or .data/lancedb; set LANCEDB_URI.\n",
        )
    assert list((no_variable / "work").iterdir()) == []


# A read-only database


@pytest.fixture
def readable_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A database that every user may read and search."""
    # Not in pytest's folder, which only its owner may search.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("LANCEDB_URI", f"{name}/db")
        fill_in_pieces(Path(name, "db"), 2)
        # Modules that are imported lazily, to show rows, have to be imported before.
        cli_main(["query-runs", "--table", SCORES])
        yield Path(name, "db")


@contextlib.contextmanager
def only_reading(folder: Path) -> Iterator[None]:
    """Removes write permission from everything in the folder, also for root."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    user = os.geteuid()
    for path in paths:
        path.chmod(0o555 if path.is_dir() else modes[path] & 0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def leave_row(folder: Path, row: OrchestratorRunSchema | HermesScoreSchema) -> Path:
    """Leaves a row in the journal, like a process that dies after its commit; returns the journal's
    file."""

    async def leave() -> None:
        journal = Journal(folder / "_log", folder / "_log" / "set_aside", lambda _: None)
        journal.start()
        await journal.commit([encoded(table_of(row), row.as_row())])
        await journal.close()

    asyncio.run(leave())
    path = folder / "_log" / "journal.sqlite3"
    path.chmod(0o644)
    return path


def test_reading_needs_no_write_permission(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.stat().st_mtime_ns for path in readable_folder.rglob("*")}
    with only_reading(readable_folder):
        capsys.readouterr()
        assert sorted(ids(lines_of(capsys, "query-runs", "--table", SCORES))) == ["0", "1"]
        lines = map(json.loads, lines_of(capsys, "stats"))
        assert [row["rows"] for row in lines if row["table"] == SCORES] == [2]
        assert f"{SCORES}: 2 of 2 rows are readable, ids are unique" in lines_of(capsys, "verify")
        assert cli_main(["export", "--format", "jsonl"]) == 0
        assert capsys.readouterr() == ("", "0 rows\n")
    assert files == {path: path.stat().st_mtime_ns for path in readable_folder.rglob("*")}


def test_rows_that_are_only_in_the_journal_are_shown_without_writing(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = NOW + datetime.timedelta(minutes=1)
    leave_row(readable_folder, score(run_id="logged", timestamp=later, score=0.9))
    with only_reading(readable_folder):
        command = ["query-runs", "--table", SCORES]
        assert ids(lines_of(capsys, *command, "--last", "1")) == ["logged"]
        assert len(lines_of(capsys, *command)) == 3
        assert ids(lines_of(capsys, *command, "--min-score", "0.8")) == ["logged"]
        assert "logged" not in ids(lines_of(capsys, *command, "--since", "2026-01-02T03:06"))
        for rest in (["stats"], ["verify"], ["export", "--format", "sft"]):
            assert cli_main(rest) == 0
            assert capsys.readouterr().err.splitlines()[-1] == (
                "1 row is still in the journal and not counted here."
            )
    # The next command with write permission moves it. A row that is in both places is shown once.
    assert len(lines_of(capsys, *command)) == 3
    with only_reading(readable_folder):
        assert len(lines_of(capsys, *command)) == 3


def test_an_unreadable_journal_is_reported(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_row(readable_folder, score(run_id="logged")).chmod(0)
    with only_reading(readable_folder):
        assert cli_main(["query-runs", "--table", SCORES]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert output.err == ("The newest rows may be missing: the journal cannot be read.\n")


def test_a_pipe_in_place_of_the_journal_is_reported(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = readable_folder / "_log" / "journal.sqlite3"
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o644)
    with only_reading(readable_folder):
        assert cli_main(["query-runs", "--table", SCORES]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert output.err == "The newest rows may be missing: the journal cannot be read.\n"


@pytest.mark.parametrize("command", ["compact", "migrate"])
def test_a_command_that_writes_reports_a_read_only_database(
    readable_folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    capsys.readouterr()
    with only_reading(readable_folder):
        assert cli_main([command]) == 1
    assert capsys.readouterr() == (
        "",
        f"The database at {readable_folder} is read-only; {command} has to write to it.\n",
    )


def test_an_unreadable_folder_is_not_reported_as_empty(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with only_reading(readable_folder):
        mode = readable_folder.stat().st_mode
        user = os.geteuid()
        os.seteuid(os.getuid())
        readable_folder.chmod(0)
        os.seteuid(user)
        try:
            assert cli_main(["query-runs"]) == 1
        finally:
            os.seteuid(os.getuid())
            readable_folder.chmod(mode)
            os.seteuid(user)
    assert capsys.readouterr().err == (
        f"The database at {readable_folder} cannot be opened: Permission denied; check "
        "LANCEDB_URI.\n"
    )


# Maintenance


def test_stats_are_json_lines_when_piped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill_in_pieces(folder, 3)
    found = {row["table"]: row for row in map(json.loads, lines_of(capsys, "stats"))}
    assert list(found) == [*TABLES, "(journal)"]
    scores = found[SCORES]
    assert (scores["rows"], scores["fragments"], scores["last_compaction"]) == (3, 3, None)
    files = [path for path in (folder / f"{SCORES}.lance").rglob("*") if path.is_file()]
    assert scores["files"] == len(files)
    assert scores["bytes"] == sum(path.stat().st_size for path in files)
    assert scores["versions"] == 4  # one of the empty table, and one per row
    assert found[RUNS]["rows"] == 0
    assert found["(journal)"]["rows"] is None
    assert lines_of(capsys, "compact")
    (row,) = (row for row in map(json.loads, lines_of(capsys, "stats")) if row["table"] == SCORES)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        row["last_compaction"]
    )
    assert age < datetime.timedelta(minutes=5)


def test_stats_are_a_table_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_in_pieces(folder, 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    header, *lines = lines_of(capsys, "stats")
    assert header.split()[:4] == ["table", "rows", "fragments", "versions"]
    assert [line.split()[0] for line in lines] == [*TABLES, "(journal)"]
    assert lines[TABLES.index(SCORES)].split()[1:3] == ["1", "1"]
    assert all(json.loads(line) for line in lines_of(capsys, "stats", "--json"))


def test_compact_merges_fragments_and_reports_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_in_pieces(folder, 4)
    lines = lines_of(capsys, "compact")
    assert f"{SCORES}: 4 fragments before, 1 after" in lines
    assert lines[-1].startswith("Compacted in ")
    assert (
        lancedb.connect(folder).open_table(SCORES).stats()["fragment_stats"]["num_fragments"] == 1
    )
    assert sorted(ids(lines_of(capsys, "query-runs", "--table", SCORES))) == list("0123")


def test_compact_fails_while_another_process_compacts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_in_pieces(folder, 1)
    with locked(folder / "_log" / COMPACTING):
        assert cli_main(["compact"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "Another process is compacting this database.\n"


def test_verify_counts_the_rows_of_a_sound_database(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_in_pieces(folder, 2)
    assert lines_of(capsys, "verify") == [
        f"{table}: {2 if table == SCORES else 0} of {2 if table == SCORES else 0} rows are "
        "readable, ids are unique"
        for table in TABLES
    ]


def test_verify_writers_finds_a_folder_safe_and_leaves_no_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_in_pieces(folder, 1)
    before = sorted(folder.glob("*.lance"))
    assert lines_of(capsys, "verify", "--writers") == [
        "8 writers created the same table at once, 20 times: no commit is lost."
    ]
    assert sorted(folder.glob("*.lance")) == before


def test_verify_finds_a_duplicate_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill_in_pieces(folder, 2)
    table = lancedb.connect(folder).open_table(SCORES)
    table.add(table.to_arrow())
    assert cli_main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{SCORES}: 4 of 4 rows are readable, 2 ids are duplicates" in lines
    assert f"{RUNS}: 0 of 0 rows are readable, ids are unique" in lines


def test_verify_fails_if_rows_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_in_pieces(folder, 1)
    (data,) = (folder / f"{SCORES}.lance" / "data").iterdir()
    data.write_bytes(b"x" * data.stat().st_size)
    assert cli_main(["verify"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


# On a terminal


class Terminal(io.StringIO):
    """Standard output and standard error of a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines on the screen, without erased text."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")[:-1]]


def on_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, Terminal]:
    """Runs a command on a terminal; returns its exit status and the terminal."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        return cli_main(arguments), terminal


def test_progress_is_shown_on_a_terminal_and_erased_before_the_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_in_pieces(folder, 2)
    status, terminal = on_terminal(monkeypatch, "verify")
    assert status == 0
    assert f"\r\x1b[K{SCORES}: 2 of 2 rows" in terminal.getvalue()
    assert [line.split(":")[0] for line in terminal.screen()] == list(TABLES)


def test_progress_is_erased_before_the_rows_of_an_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_AT_ONCE", 1)

    async def fill() -> None:
        store = await Store.open(folder)
        for name in ("t-1", "t-2"):
            await store.append(feedback(transaction_id=name))
        await store.last(SCORES, 1)
        await store.close()

    asyncio.run(fill())
    status, terminal = on_terminal(monkeypatch, "export", "--format", "jsonl")
    assert status == 0
    assert "1 of 2 feedback rows" in terminal.getvalue()
    *rows, count = terminal.screen()
    assert sorted(json.loads(row)["transaction_id"] for row in rows) == ["t-1", "t-2"]
    assert count == "2 rows"


def test_progress_is_erased_before_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [{"run_id": str(number), "score": 0.5} for number in range(3)]
    lancedb.connect(folder).create_table(SCORES, pa.Table.from_pylist(old))
    (folder / "_log").mkdir()
    (folder / "_log" / "set_aside").write_text("in the way")
    status, terminal = on_terminal(monkeypatch, "migrate")
    assert status == 1
    assert f"\r\x1b[K{SCORES}: 3 rows" in terminal.getvalue()
    assert terminal.screen()[-1].startswith("The database cannot be used: ")


def test_no_progress_is_written_to_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill_in_pieces(folder, 2)
    for arguments in (["verify"], ["migrate"], ["export", "--format", "jsonl"]):
        capsys.readouterr()
        assert cli_main(arguments) == 0
        output = capsys.readouterr()
        assert "\x1b" not in output.out + output.err
        assert output.err in ("", "0 rows\n")


# Ctrl-C


@contextlib.contextmanager
def interrupting_store(monkeypatch: pytest.MonkeyPatch, logs: Path) -> Iterator[None]:
    """An object store that never responds; a request to it triggers Ctrl-C."""
    held: list[Any] = []

    def interrupt() -> None:
        with contextlib.suppress(OSError):
            held.append(server.accept()[0])
            # Sent to this thread. A signal to a thread that does not wait, or just before the wait,
            # does not end the wait.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in {
            "LANCEDB_URI": "s3://bucket/db",
            "LANCEDB_LOG_DIR": str(logs),
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        yield
        thread.join(30)
    for connection in held:
        connection.close()


def test_ctrl_c_exits_with_130_and_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # If a script runs the tests in the background, they ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupting_store(monkeypatch, tmp_path):
            assert cli_main(["migrate", "--alone"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_ctrl_c_ends_a_script_that_waits_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with interrupting_store(monkeypatch, tmp_path), pytest.raises(KeyboardInterrupt):
            db.init_db()
    finally:
        signal.signal(signal.SIGINT, before)
    # The command itself would give up only after half a minute.
    assert time.monotonic() - began < 15


def test_rows_of_a_process_that_has_died_are_verified_and_counted(
    readable_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_row(readable_folder, score(run_id="left"))
    assert f"{SCORES}: 3 of 3 rows are readable, ids are unique" in lines_of(capsys, "verify")
    leave_row(readable_folder, score(run_id="left too"))
    lines = [json.loads(line) for line in lines_of(capsys, "stats")]
    assert [row["rows"] for row in lines if row["table"] == SCORES] == [4]
