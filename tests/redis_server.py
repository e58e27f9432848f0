"""A real redis-server on a free port, for tests that need one to come and go."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from tests.programs import require_program


def require_redis() -> None:
    """Skip the test where there is no redis-server; fail it in CI, which has to have one."""
    require_program("redis-server")


class RedisServer:
    """One redis-server on a loopback port, which a restart does not change.

    Its only files are in a temporary folder, which is removed with it. Use it as a context manager,
    or call `start` later for a server that becomes available late.

    Args:
        options: further options of redis-server.
        keep: whether the folder survives a restart; `remove` deletes it.

    Attributes:
        port, url: its address.
        folder: its folder.
    """

    def __init__(self, *options: str, keep: bool = False) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._keep = keep
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def folder(self) -> Path:
        """Its folder, which is created if it is missing."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="redis-test-")
        return Path(self._folder.name)

    def start(self) -> None:
        """Start it and return when it takes connections."""
        settings = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(self.folder),
            "--save": "",
        }
        command = ["redis-server", *(word for pair in settings.items() for word in pair)]
        self._process = subprocess.Popen(
            [*command, *self._options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        said: list[str] = []
        for line in self._process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                return
        self.kill()
        raise RuntimeError("redis-server did not start:\n" + "".join(said))

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        if not self._keep:
            self.remove()

    def remove(self) -> None:
        """End it, and remove its folder."""
        self._keep = False
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def freeze(self) -> None:
        """Stop it answering while its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def entries(client: redis.Redis, stream: str) -> list[tuple[str, dict[str, str]]]:
    """The entries of a stream, oldest first; the client decodes responses."""
    found: Any = client.xrange(stream)
    return list(found)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
