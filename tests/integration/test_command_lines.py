"""The command lines as processes: closed and full standard streams, terminals."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from llm_sidecar import db
from tests.test_db import RUN

ROOT = Path(__file__).resolve().parents[2]
FULL = "standard output: No space left on device\n"
CLOSED = "standard output: Bad file descriptor\n"


def in_shell(command: str, **environ: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a shell command that runs Python as $PY."""
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PY": sys.executable, "PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("database") / "db"
    db.log_run(RUN, uri=str(folder))
    return folder


@pytest.mark.parametrize(
    ("arguments", "streams", "status", "shown", "message"),
    [
        ("query-runs", "2>&-", 0, True, ""),
        ("query-runs", ">/dev/full", 1, False, FULL),
        ("query-runs", "<&- >&- 2>&-", 1, False, ""),
        # Without the database library, which takes a second to import.
        ("query-runs --help", "2>/dev/full", 0, True, ""),
        ("query-runs --help", ">&-", 1, False, CLOSED),
    ],
)
def test_output_and_standard_streams(
    folder: Path, arguments: str, streams: str, status: int, shown: bool, message: str
) -> None:
    command = f"$PY -m llm_sidecar.db {arguments} {streams}"
    found, out, err = in_shell(command, LANCEDB_URI=str(folder))
    assert (found, bool(out), err) == (status, shown, message)


@pytest.mark.parametrize("module", ["llm_sidecar.loader", "llm_sidecar.tts", "osiris"])
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [("--help >/dev/full", 1, FULL), ("frobnicate >&- 2>/dev/full", 2, "")],
)
def test_help_and_standard_streams(module: str, arguments: str, status: int, message: str) -> None:
    found, out, err = in_shell(f"$PY -m {module} {arguments}")
    assert (found, out, err) == (status, "", message)


def test_no_command_prints_help_and_an_unknown_one_is_an_error() -> None:
    found, out, err = in_shell("$PY -m llm_sidecar.loader")
    assert (found, err) == (0, "")
    assert out.startswith("Usage: python -m llm_sidecar.loader [OPTIONS] COMMAND")
    message = "python -m llm_sidecar.loader: No such command 'frobnicate'.\n"
    assert in_shell("$PY -m llm_sidecar.loader frobnicate") == (2, "", message)


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """Otherwise what is meant for the stream would go into the file."""
    code = (
        "from llm_sidecar import command_line\n"
        "def work():\n"
        "    with open('/dev/null') as file:\n"
        "        return 0 if file.fileno() > 2 else 1\n"
        "raise SystemExit(command_line.run(work))\n"
    )
    assert in_shell(f'$PY -c "{code}" <&- >&- 2>&-')[0] == 0


def test_a_child_has_standard_streams_where_its_parent_had_none() -> None:
    """The workers of models are children of the server."""
    code = (
        "import subprocess, sys\n"
        "from llm_sidecar import command_line\n"
        "child = 'import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))'\n"
        "work = lambda: subprocess.run([sys.executable, '-c', child]).returncode\n"
        "raise SystemExit(command_line.run(work))\n"
    )
    assert in_shell(f'$PY -c "{code}" <&- >&- 2>&-')[0] == 0


def test_a_real_terminal_of_another_encoding(folder: Path) -> None:
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 40))
    # Without COLUMNS, which would hide the size of the terminal.
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "LANCEDB_URI": str(folder),
        "PYTHONIOENCODING": "latin-1",
        "TERM": "dumb",
    }
    done = subprocess.run(
        [sys.executable, "-m", "llm_sidecar.db", "query-runs"],
        env=environ,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        check=False,
    )
    os.close(terminal)
    out = os.read(ours, 1 << 16).decode("latin-1")
    os.close(ours)
    assert done.returncode == 0
    assert out.splitlines() == [
        "run_id         r-1",
        "timestamp      2026-01-02 03:04:05",
        "input_query    Long ABC",
        "final_output   {}",
        "status         success",
    ]


def test_help_needs_no_database_library() -> None:
    code = (
        "import sys; from llm_sidecar.db import cli_main; cli_main(['query-runs', '--help']);"
        "print(*({'lancedb', 'pyarrow', 'rich.console'} & set(sys.modules)))"
    )
    found, out, _ = in_shell(f'$PY -c "{code}"')
    assert (found, out.splitlines()[-1]) == (0, "")


def test_a_server_needs_no_command_line_parser() -> None:
    code = "import sys, llm_sidecar.db; print('typer' in sys.modules)"
    assert in_shell(f'$PY -c "{code}"') == (0, "False\n", "")


def test_a_command_ends_without_a_search_for_garbage() -> None:
    """The search takes up to half a second if the database library is imported."""
    code = (
        "import atexit, gc\n"
        # Functions run in reverse order, so this one runs last.
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from llm_sidecar import command_line\n"
    )
    assert in_shell(f'$PY -c "{code}"') == (0, "True\n", "")
