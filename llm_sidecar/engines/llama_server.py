"""A llama.cpp server on a loopback port, started and watched by this process.

    server = LlamaServer.start(options, program=find_program(None))
    server.post("/tokenize", {"content": "Hi."})
    with server.watching(server.connect()) as connection:
        for event in connection.events("/completion", {...}):
            ...

If the server ends, this process ends in the same way: so a crash of llama.cpp is a crash of the
worker, as it is with the runtimes inside a worker.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from llm_sidecar.engines.llama_connection import Connection
from llm_sidecar.errors import ModelUnavailable

log = logging.getLogger(__name__)

_PROGRAM: Final = Path(__file__).with_name("llama_process.py")
_LISTENING: Final = re.compile(r"(?:http://127\.0\.0\.1:|127\.0\.0\.1, port: )(\d+)")
_ON_GPU: Final = re.compile(r"offloaded ([1-9]\d*)/\d+ layers to GPU")
_ERROR: Final = re.compile(r"\b(?:error|failed|exception)\b.*", re.IGNORECASE)
_NO_MEMORY: Final = re.compile(r"memory|alloc", re.IGNORECASE)
_KEPT_LINES: Final = 200
_POLL_SECONDS: Final = 0.05
_END_SECONDS: Final = 1.0
"""How long the end of the server may follow that of its connections."""
_CALL_SECONDS: Final = 60.0
"""Time limit for an answer that needs no computation."""
_SILENT_SECONDS: Final = 3600.0
"""Time limit for each part of an answer that needs computation. The prompts of other requests may
come first. A server that hangs is killed long before this."""
_CHECK_SECONDS: Final = 30.0
"""How often a server is asked whether it still computes."""
_HUNG_SECONDS: Final = 300.0
"""Seconds without an answer after which a server counts as hung. One step may take long: 256 prompt
tokens of a large model on a few slow cores."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a server loads its model.

    Attributes:
        model: the first file of the model.
        context: number of tokens that all requests share.
        slots: number of requests at the same time.
        threads: of the computation.
        batch: prompt tokens of one step; a request can be cancelled between two steps.
        cache_mib: memory for the states of earlier prompts, in MiB.
        layers_on_gpu: None for as many as fit.
        adapter: a LoRA adapter, or None.
    """

    model: str
    context: int
    slots: int
    threads: int
    batch: int
    cache_mib: int
    layers_on_gpu: int | None = None
    adapter: str | None = None


def find_program(configured: str | None) -> str | None:
    """The llama-server to run: the configured one, else the one on the PATH; None for the wheel.

    Raises:
        ModelUnavailable: there is none.
    """
    if configured is not None:
        found = shutil.which(configured)
        if found is None:
            raise ModelUnavailable(f"LLAMA_SERVER: {configured} is not an executable program")
        return found
    found = shutil.which("llama-server")
    if found is None and importlib.util.find_spec("xllamacpp") is None:
        raise ModelUnavailable(
            "a .gguf file needs llama.cpp: install the wheel (pip install -r "
            "requirements-gguf.txt), or set LLAMA_SERVER to a llama-server"
        )
    return found


class LlamaServer:
    """A running server.

    Attributes:
        process: the process.
        on_gpu: whether a GPU holds layers of the model.
    """

    def __init__(self, command: Sequence[str], key: str) -> None:
        """Use `LlamaServer.start`."""
        self.on_gpu = False
        self._key = key
        self._port = 0
        self._loaded = False
        self._closed = threading.Event()
        self._listening = threading.Event()
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        started: Future[subprocess.Popen[str]] = Future()
        self._watcher = threading.Thread(
            target=self._start_and_watch, args=(command, started), daemon=True
        )
        self._watcher.start()
        self.process = started.result()

    @classmethod
    def start(cls, options: Options, program: str | None) -> LlamaServer:
        """Starts a server and returns it when the model is loaded.

        Args:
            program: a llama-server; None for the wheel.

        Raises:
            ModelUnavailable: the model cannot be loaded; says why.
            ChildProcessError: it was killed, or there is not enough memory.
            OSError: no process can be started.
        """
        arguments = {"program": program, "parent": os.getpid(), **asdict(options)}
        command = [sys.executable, "-I", str(_PROGRAM), json.dumps(arguments)]
        server = cls(command, secrets.token_urlsafe(32))
        try:
            server._wait_until_loaded()
            threading.Thread(target=server._kill_if_hung, daemon=True).start()
        except BaseException:
            server.close()
            raise
        return server

    def get(self, path: str) -> Any:
        """The JSON of a GET request; see `post`."""
        with self.watching(self._connect(_CALL_SECONDS)) as connection:
            return json.loads(connection.get(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers a POST request for which nothing is computed.

        Raises:
            ModelUnavailable, OSError, http.client.HTTPException: see `Connection.post`.
        """
        with self.watching(self._connect(_CALL_SECONDS)) as connection:
            return json.loads(connection.post(path, body))

    def connect(self) -> Connection:
        """A new connection for requests that compute; see `watching`."""
        return self._connect(_SILENT_SECONDS)

    @contextlib.contextmanager
    def watching(self, connection: Connection) -> Iterator[Connection]:
        """Closes a connection after this context. If the connection fails because the server has
        ended, this process ends too."""
        try:
            yield connection
        except (OSError, http.client.HTTPException):
            if not connection.is_cancelled:
                self._watcher.join(_END_SECONDS)
            raise
        finally:
            connection.close()

    def close(self) -> None:
        """Ends the server."""
        self._closed.set()
        self.process.kill()
        self._watcher.join()

    def answers(self, seconds: float) -> bool:
        """Whether it answers in time what it only answers between two steps of its computation."""
        try:
            with contextlib.closing(self._connect(seconds)) as connection:
                connection.get("/slots")
        except TimeoutError:
            return False
        except (ModelUnavailable, OSError, http.client.HTTPException):
            # Either it has answered, or it has ended, which `_watch` detects.
            pass
        return True

    def _kill_if_hung(self) -> None:
        while not self._closed.wait(_CHECK_SECONDS):
            if not self.answers(_HUNG_SECONDS) and not self._closed.is_set():
                log.error("llama.cpp has not answered for %g s; killing it", _HUNG_SECONDS)
                self.process.kill()
                return

    def _connect(self, seconds: float) -> Connection:
        return Connection(self._port, self._key, seconds)

    def _wait_until_loaded(self) -> None:
        self._listening.wait()
        while self._port:
            try:
                if self.get("/health").get("status") == "ok":
                    self._loaded = True
                    return
            except ModelUnavailable:
                # It is loading.
                pass
            except (OSError, http.client.HTTPException):
                break
            # Whatever it answers: an answer other than `ok` must not make this loop spin.
            time.sleep(_POLL_SECONDS)
        self._watcher.join()
        reason = reason_of_failure(self._lines, self.process.returncode)
        if self.process.returncode < 0 or _NO_MEMORY.search(reason):
            # The next attempt may have more memory.
            raise ChildProcessError(f"llama.cpp ended while it loaded the model: {reason}")
        raise ModelUnavailable(f"llama.cpp cannot load the model: {reason}")

    def _start_and_watch(
        self, command: Sequence[str], started: Future[subprocess.Popen[str]]
    ) -> None:
        """Starts the server, in the thread that waits for its end: the kernel ends it with the
        thread that has started it, and other threads may end earlier."""
        try:
            process = _spawn(command, self._key)
        except OSError as error:
            started.set_exception(error)
        else:
            started.set_result(process)
            self._watch(process)

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """Reads what the server writes while it loads, and ends this process with it.

        Later output is dropped: it may quote a prompt.
        """
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                if _ON_GPU.search(line):
                    self.on_gpu = True
                if not self._loaded:
                    self._lines.append(line.strip())
                if not self._port and (found := _LISTENING.search(line)):
                    self._port = int(found[1])
                    self._listening.set()
        code = process.returncode
        self._listening.set()
        if self._loaded and not self._closed.is_set():
            log.error("llama.cpp ended with status %d, so this process ends too", code)
            if code < 0:
                signal.raise_signal(-code)
            os._exit(1)


def _spawn(command: Sequence[str], key: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        # It ends with this process.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Threads that wait would otherwise spin and occupy cores: see
        # docs/adr/0012-gguf-models-on-llama-cpp.md for the figures.
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "LLAMA_API_KEY": key},
    )


def reason_of_failure(lines: Iterable[str], code: int) -> str:
    """Why a server ended: the first error that it wrote, else its exit status."""
    for line in lines:
        if found := _ERROR.search(line):
            return found[0]
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
