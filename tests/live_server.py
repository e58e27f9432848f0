"""Runs `python -m osiris` as operators do, on a free port, and looks at its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent


class LiveServer:
    """A running server.

    Attributes:
        url: its base URL.
        process: the server's process.
        client: an HTTP client with that base URL.
        log: file its standard error goes to.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log = log
        self.client = httpx.Client(base_url=self.url, timeout=60.0)

    def wait_until(
        self, condition: Callable[[], Any], seconds: float = 60.0, interval: float = 0.02
    ) -> Any:
        """The first true value of `condition`, which may raise transport errors until then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                value = condition()
                if value:
                    return value
            time.sleep(interval)
        raise AssertionError(f"it did not come true:\n{self.log.read_text()}")

    def wait_until_ready(self) -> None:
        self.wait_until(lambda: self.client.get("/health/ready").status_code == 200)

    def wait_until_database_is_open(self) -> None:
        def is_open() -> bool:
            return bool(self.client.get("/health").json()["database"]["state"] == "open")

        self.wait_until(is_open)

    def worker(self, name: str) -> int:
        """The process id of a model's worker."""
        pid: int = self.client.get("/health").json()["models"][name]["pid"]
        return pid

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status.

        The client's idle connections are closed first: the server would wait for them.
        """
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(30)


@contextlib.contextmanager
def serve(
    folder: Path,
    *options: str,
    app: str | None = None,
    python: str = sys.executable,
    **environ: str,
) -> Iterator[LiveServer]:
    """A server whose configuration is `environ` alone, with its data in `folder`.

    Args:
        app: another app, as `module:name`, which uvicorn serves.
        python: the Python of the environment with the sidecar's packages.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    settings = {
        "REDIS_URL": "memory://",
        "LANCEDB_URI": str(folder / "lancedb"),
        "SHUTDOWN_DRAIN_SECONDS": "0",
        # It starts in no time.
        "TTS_VOICE": "espeak",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        **environ,
    }
    module = ["osiris"] if app is None else ["uvicorn", app]
    command = [python, "-m", *module, "--port", str(port), *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=stderr, stderr=stderr)
    server = LiveServer(port, process, log)
    try:
        server.wait_until(lambda: server.client.get("/health/live").status_code == 200)
        yield server
    finally:
        server.client.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
