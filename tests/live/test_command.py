"""`python -m osiris`: uvicorn's options, and what is wrong with them in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from osiris.__main__ import command
from tests.live_server import ROOT

pytestmark = pytest.mark.own_process("tests the options of the command")

WORKERS = (
    "there can only be 1 worker, because each one would load the models again; to serve more "
    "requests, run more sidecars behind a load balancer."
)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (["--workers", "2"], {}, f"--workers 2: {WORKERS}"),
        ([], {"UVICORN_WORKERS": "3"}, f"--workers 3: {WORKERS}"),
        ([], {"WEB_CONCURRENCY": "4"}, f"WEB_CONCURRENCY: {WORKERS}"),
        (["--port", "70000"], {}, "Invalid value for '--port': 70000 is not in the range"),
        (["--no-such"], {}, "No such option"),
        (["--ssl-keyfile", "key.pem"], {}, "--ssl-keyfile needs --ssl-certfile."),
        (["--ssl-certfile", "/none"], {}, "--ssl-certfile cannot be used: [Errno 2] No such file"),
        (["--uds", "/none/socket"], {}, "--uds cannot be used: [Errno 2] No such file"),
        (
            ["--uds", "/tmp"],
            {},
            "--uds cannot be used: [Errno 17] The path exists and is not a socket",
        ),
        (["--uds", "/tmp/" + "s" * 103], {}, "--uds cannot be used: its path is longer than 107"),
        (["--fd", "987"], {}, "--fd cannot be used: [Errno 9] Bad file descriptor"),
        (["--fd", "2"], {}, "--fd cannot be used: [Errno 88] Socket operation on non-socket"),
        (["--header", "X-Desk"], {}, "--header takes NAME:VALUE."),
    ],
)
def test_a_bad_option_ends_with_one_sentence(
    options: list[str], environ: dict[str, str], message: str
) -> None:
    done = CliRunner().invoke(command(), options, env=environ)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(f"Error: {message}")


def test_help_lists_uvicorns_options_and_not_those_that_are_fixed() -> None:
    done = CliRunner().invoke(command(), ["--help"])
    assert done.exit_code == 0
    for option in ("--host", "--root-path", "--reload", "--uds", "--fd", "--proxy-headers"):
        assert f" {option} " in done.output.replace("/", " ")
    for option in ("--http ", "--ws ", "--factory", "--interface", "--lifespan"):
        assert option not in done.output


def test_an_invalid_certificate_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    done = start(tmp_path, "--ssl-certfile", str(tmp_path / "none.pem"))
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1
    assert errors.splitlines()[-1].startswith("osiris-sidecar: the server cannot start: [SSL]")
    assert "Traceback" not in errors


def start(folder: Path, *options: str, **settings: str) -> subprocess.Popen[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "REDIS_URL": "memory://",
        "LANCEDB_URI": str(folder / "lancedb"),
        **settings,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "osiris", *options],
        env=environ,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_serves_on_a_unix_socket_and_ends_when_the_terminal_does(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    process = start(tmp_path, "--uds", str(path))
    assert process.stderr is not None
    assert any("running on unix socket" in line for line in process.stderr)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://sidecar/health/live").status_code == 200
    process.send_signal(signal.SIGHUP)
    errors = process.stderr.read()
    assert process.wait(30) == 0
    assert "drained: every request is answered" in errors
    assert not path.exists()
    process.stderr.close()
