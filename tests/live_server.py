"""Runs `python -m osiris` as operators do, on a free port, and looks at its processes.

The variable `LIVE_TARGET` chooses what `serve` runs, so that tests/live tests each way to run the
sidecar: `one` (the default), `two` sidecars behind the proxy, or the application on `ray`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from llm_sidecar.db import Store
    from tests.metrics_text import MetricsText

ROOT = Path(__file__).resolve().parent.parent
TARGET = os.environ.get("LIVE_TARGET", "one")


class LiveServer:
    """A running server.

    Attributes:
        url: its base URL.
        process: the server's process.
        client: an HTTP client with that base URL.
        log: file its standard error goes to.
        database: the address of its database.
        sidecars: those that answer under the URL: itself, unless it is a proxy.
    """

    def __init__(
        self,
        port: int,
        process: subprocess.Popen[bytes],
        log: Path,
        database: str = "",
        sidecars: tuple[LiveServer, ...] = (),
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log = log
        self.client = httpx.Client(base_url=self.url, timeout=60.0)
        self.database = database
        self.sidecars = sidecars or (self,)

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
        raise AssertionError(f"it did not come true:\n{self.logged()}")

    def wait_until_ready(self) -> None:
        def ready(one: LiveServer) -> bool:
            return one.client.get("/health/ready").status_code == 200

        for one in (*self.sidecars, self):
            self.wait_until(partial(ready, one))

    def wait_until_database_is_open(self) -> None:
        self.wait_until(lambda: all(h["database"]["state"] == "open" for h in self.healths()))

    def healths(self) -> list[dict[str, Any]]:
        """`/health` of each sidecar."""
        # With the API key of the client, if there is one.
        headers = self.client.headers
        return [one.client.get("/health", headers=headers).json() for one in self.sidecars]

    def total(self, *path: str) -> int:
        """The sum of a number in `/health` over all sidecars, such as ("speech", "listeners")."""
        total = 0
        for health in self.healths():
            value: Any = health
            for name in path:
                value = value[name]
            total += value
        return total

    def metrics(self) -> MetricsText:
        """The metrics of all sidecars."""
        from tests.metrics_text import MetricsText

        headers = self.client.headers
        answers = [one.client.get("/metrics", headers=headers) for one in self.sidecars]
        return MetricsText(*(answer.raise_for_status().text for answer in answers))

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of the sidecar's own log. Those of Ray begin with the name of the process."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line[line.index("{") :]) for line in lines if '{"timestamp": ' in line]

    def logged(self) -> str:
        """The logs of all processes."""
        return "".join(log.read_text() for log in {one.log for one in (self, *self.sidecars)})

    def workers(self, name: str) -> list[int]:
        """The process ids of a model's workers."""
        return [health["models"][name]["pid"] for health in self.healths()]

    def worker(self, name: str) -> int:
        """The process id of the only worker of a model."""
        (pid,) = self.workers(name)
        return pid

    @contextlib.asynccontextmanager
    async def stored(self) -> AsyncIterator[Store]:
        """The database, once it has every row that the sidecars have taken."""
        from llm_sidecar.db import Store

        def all_moved() -> bool:
            return self.total("database", "rows_waiting") == 0

        await asyncio.to_thread(self.wait_until, all_moved)
        store = await Store.open(self.database, create=False)
        try:
            yield store
        finally:
            await store.close()

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status.

        The client's idle connections are closed first: the server would wait for them.
        """
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(30)


def serve(
    folder: Path,
    *options: str,
    app: str | None = None,
    python: str = sys.executable,
    port: str = "",
    **environ: str,
) -> contextlib.AbstractContextManager[LiveServer]:
    """The target, with its data in `folder`: see `serve_one`."""
    if TARGET == "one":
        return serve_one(folder, *options, app=app, python=python, port=port, **environ)
    from tests import live_targets

    return live_targets.TARGETS[TARGET](folder, *options, app=app, **environ)


@contextlib.contextmanager
def serve_one(
    folder: Path,
    *options: str,
    app: str | None = None,
    python: str = sys.executable,
    port: str = "",
    **environ: str,
) -> Iterator[LiveServer]:
    """A server whose configuration is `environ` alone, with its data in `folder`.

    Args:
        app: another app, as `module:name`, which uvicorn serves.
        python: the Python of the environment with the sidecar's packages.
        port: a free one, unless it is given.
    """
    number = int(port) if port else free_port()
    log = folder / f"server-{number}.log"
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
    command = [python, "-m", *module, "--port", str(number), *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=stderr, stderr=stderr)
    server = LiveServer(number, process, log, settings["LANCEDB_URI"])
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
