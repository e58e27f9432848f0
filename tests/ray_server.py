"""Runs `python -m osiris.ray_serve` in the environment `.venv-ray`, and looks at its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from osiris.ray_serve import ports
from tests.live_server import ROOT, LiveServer, free_port

PYTHON = ROOT / ".venv-ray" / "bin" / "python"
START_SECONDS = 180.0


def require_ray() -> None:
    """Fails with a sentence if Ray is not installed."""
    if not PYTHON.exists():
        pytest.fail("Ray is not installed: `make .venv-ray/.installed` sets up its environment.")


@contextlib.contextmanager
def serve_ray(folder: Path, *options: str, **environ: str) -> Iterator[LiveServer]:
    """The application whose configuration is `environ` alone, with its data in `folder`, and with
    its models loaded."""
    with start_ray(folder, *options, **environ) as server:
        server.wait_until_ready()
        yield server


@contextlib.contextmanager
def start_ray(folder: Path, *options: str, **environ: str) -> Iterator[LiveServer]:
    """The same, as soon as it answers."""
    require_ray()
    port = free_port()
    log = folder / f"ray-{port}.log"
    settings = {
        "REDIS_URL": "memory://",
        "LANCEDB_URI": str(folder / "lancedb"),
        # It starts in no time.
        "TTS_VOICE": "espeak",
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        **environ,
    }
    command = [str(PYTHON), "-m", "osiris.ray_serve", "--port", str(port), *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=stderr, stderr=stderr)
    server = LiveServer(port, process, log, settings["LANCEDB_URI"])
    server.client.timeout = 120.0
    try:
        server.wait_until(lambda: "serving on" in log.read_text(), START_SECONDS)
        yield server
    finally:
        server.client.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                # Its children end with it.
                process.kill()
                process.wait()


def replicas(server: LiveServer, deployment: str) -> list[int]:
    """The process ids of the replicas of a deployment."""
    found = []
    for pid in ports.tree(server.process.pid):
        with contextlib.suppress(OSError):
            if f"ray::ServeReplica:osiris:{deployment}" in _command(pid):
                found.append(pid)
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
