"""Two sidecars behind the proxy of deploy/scale, with one Redis and one object store.

    with two_sidecars(folder, app="tests.quick_app:app") as two:
        two.proxy.client.post(...)
        two.kill("a")
        two.start("a")

Everything listens on loopback alone. Each sidecar has a journal of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.live_server import ROOT, LiveServer, free_port, serve_one
from tests.programs import require_program
from tests.redis_server import RedisServer, require_redis
from tests.s3_server import BUCKET, S3Server

CONFIGURATION = ROOT / "deploy" / "scale" / "haproxy.cfg"
NAMES = ("a", "b")


class TwoSidecars:
    """The running parts.

    Attributes:
        proxy: the proxy, as a server: `url`, `client`, `process`, `log`.
        redis: what both sidecars share, with the object store `s3`.
        database: the URI of the database in the object store.
        environ: the variables of both sidecars.
    """

    proxy: LiveServer

    def __init__(
        self,
        folder: Path,
        redis: RedisServer,
        s3: S3Server,
        app: str | None,
        environ: dict[str, str],
    ) -> None:
        self.redis = redis
        self.s3 = s3
        self.database = f"s3://{BUCKET}/db"
        self.environ = s3.environ() | {"REDIS_URL": redis.url, "LANCEDB_URI": self.database}
        self.environ |= environ
        self._folder = folder
        self._app = app
        self._ports = {name: free_port() for name in NAMES}
        self._sidecars: dict[str, LiveServer] = {}
        self._running = {name: contextlib.ExitStack() for name in NAMES}

    def __getitem__(self, name: str) -> LiveServer:
        """The sidecar `a` or `b`."""
        return self._sidecars[name]

    @property
    def both(self) -> tuple[LiveServer, LiveServer]:
        """The sidecars."""
        return self["a"], self["b"]

    def start(self, name: str) -> LiveServer:
        """Starts a sidecar, on the port and with the journal of its last start.

        It answers then; `wait_until_ready` waits for its models and its database.
        """
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        environ = {"LANCEDB_LOG_DIR": str(folder / "log")} | self.environ
        running = serve_one(folder, app=self._app, port=str(self._ports[name]), **environ)
        self._sidecars[name] = self._running[name].enter_context(running)
        return self[name]

    def kill(self, name: str) -> None:
        """Ends a sidecar at once, as kill -9 does. Its workers end with it."""
        self[name].process.kill()
        self[name].process.wait()
        self._running[name].close()

    def stop(self, name: str) -> int:
        """Ends a sidecar as an operator does; returns its exit status."""
        status = self[name].stop()
        self._running[name].close()
        return status

    def wait_until_ready(self, name: str) -> None:
        """Waits until a sidecar would answer, has opened the database and reached Redis."""

        def is_connected() -> bool:
            return bool(self[name].client.get("/health").json()["event_bus"]["connected"])

        self[name].wait_until_ready()
        self[name].wait_until_database_is_open()
        self[name].wait_until(is_connected)

    @contextlib.contextmanager
    def running(self) -> Iterator[TwoSidecars]:
        """Starts everything, and ends it."""
        with contextlib.ExitStack() as stack:
            for name in NAMES:
                stack.enter_context(self._running[name])
            with ThreadPoolExecutor(len(NAMES)) as threads:
                list(threads.map(self.start, NAMES))
            for name in NAMES:
                self.wait_until_ready(name)
            self.proxy = stack.enter_context(serve_proxy(self._folder, self.both))
            self.proxy.wait_until_ready()
            yield self


@contextlib.contextmanager
def two_sidecars(folder: Path, *, app: str | None = None, **environ: str) -> Iterator[TwoSidecars]:
    """Both are ready, behind the proxy.

    Args:
        folder: for the journals, the logs and the data of the parts.
        app: another app than `python -m osiris`, such as `tests.quick_app:app`, whose models
            answer at once. With `SIDECAR_DEMO="true"` the command has the demo models.
        environ: variables of both sidecars, which replace those that this sets.
    """
    require_redis()
    require_program("haproxy")
    s3 = S3Server()
    try:
        asyncio.run(s3.create_bucket())
        with (
            RedisServer() as redis,
            TwoSidecars(folder, redis, s3, app, environ).running() as two,
        ):
            yield two
    finally:
        s3.end()


class Proxy(LiveServer):
    """A running proxy.

    Args:
        statistics: the port of its statistics.
    """

    def __init__(
        self,
        port: int,
        process: subprocess.Popen[bytes],
        log: Path,
        sidecars: tuple[LiveServer, ...],
        statistics: int,
    ) -> None:
        super().__init__(port, process, log, sidecars[0].database, sidecars)
        self._statistics = statistics

    def wait_until_ready(self) -> None:
        """Returns when the sidecars are ready, and the proxy has seen it."""
        super().wait_until_ready()
        self.wait_until(lambda: self._ready() == len(self.sidecars))

    def _ready(self) -> int:
        text = httpx.get(f"http://127.0.0.1:{self._statistics}/;csv").text
        found = csv.DictReader(text.removeprefix("# ").splitlines())
        states = {(row["pxname"], row["svname"]): row["status"] for row in found}
        return [states["ready", name] for name in NAMES].count("UP")


_STATISTICS = """
frontend statistics
    bind 127.0.0.1:{port}
    stats enable
    stats uri /
"""


@contextlib.contextmanager
def serve_proxy(folder: Path, sidecars: tuple[LiveServer, ...]) -> Iterator[Proxy]:
    """The proxy in front of these sidecars. It has statistics, which the deployed one has not."""
    port, statistics = free_port(), free_port()
    log, more = folder / "proxy.log", folder / "statistics.cfg"
    more.write_text(_STATISTICS.format(port=statistics))
    environ = {
        f"SIDECAR_{name.upper()}": sidecar.url.removeprefix("http://")
        for name, sidecar in zip(NAMES, sidecars, strict=True)
    }
    environ["PROXY_BIND"] = f"127.0.0.1:{port}"
    haproxy = require_program("haproxy")
    command = [haproxy, "-db", "-f", str(CONFIGURATION), "-f", str(more)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    server = Proxy(port, process, log, sidecars, statistics)
    try:
        server.wait_until(lambda: server.client.get("/health/live").status_code == 200)
        yield server
    finally:
        server.stop()
