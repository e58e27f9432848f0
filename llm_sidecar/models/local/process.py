"""The server's end of one worker process: its socket, and an inbox for every request it has."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import start_detached

log = logging.getLogger(__name__)

_ROOT: Final = str(Path(__file__).resolve().parents[3])
_LINE_LIMIT: Final = 64 << 20
"""Bytes of one line from the worker."""
_EXIT_GRACE: Final = 3.0
"""Seconds a worker has to end after its input was closed."""


class WorkerEnded(ModelUnavailable):
    """The process ended while it loaded its model.

    Attributes:
        worker: the process that ended.
    """

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__(f"its worker ended: {worker.how_it_ended()}")
        self.worker = worker


class WorkerProcess:
    """A process running `llm_sidecar.models.local.worker`; the protocol is described there.

    Attributes:
        label: of the model it holds.
        adapter: name of the adapter that it loads with the model, or None.
        process: the process.
        info: what it said when it was ready: runtime, device, context_length.
        idle: set while it has no request to answer.
        stopping: whether `stop` was called, so that its end is expected.
        ended: set once it has ended.
    """

    def __init__(
        self,
        label: str,
        adapter: str | None,
        process: subprocess.Popen[bytes],
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        on_tokens: Callable[[int], None],
    ) -> None:
        """Use `WorkerProcess.start`."""
        self.label = label
        self.adapter = adapter
        self.process = process
        self.info: dict[str, Any] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self.ended = asyncio.Event()
        self._on_tokens = on_tokens
        self._tokens = 0
        self._stdin = stdin
        self.stopping = False
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(stdout))

    @classmethod
    async def start(
        cls,
        label: str,
        adapter: str | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> WorkerProcess:
        """Spawns a process in a session of its own, so that Ctrl-C reaches the server only.

        With `subprocess`, whatever the event loop: it uses vfork, while uvloop's fork runs the
        handlers of lancedb in the child, which may deadlock. And through a socket: uvloop closes
        the descriptor of a pipe twice, and the second time it may be somebody else's.

        Args:
            label, adapter: names of what it is to load, for the attributes.
            on_tokens: is called with the number of new completion tokens, as they are generated.
        """
        # The worker, its connection and its reader outlive the request that starts them.
        starting = start_detached(cls._start(label, adapter, on_tokens))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Spawning in a thread cannot be cancelled, so its process is stopped afterwards.
            with contextlib.suppress(OSError):
                await (await starting).stop()
            raise

    @classmethod
    async def _start(
        cls, label: str, adapter: str | None, on_tokens: Callable[[int], None]
    ) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.to_thread(_spawn, theirs)
            except BaseException:
                ours.close()
                raise
        stdout, stdin = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
        return cls(label, adapter, process, stdin, stdout, on_tokens)

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return not self.ended.is_set()

    async def load(self, spec: dict[str, Any]) -> None:
        """Returns when the worker is ready; ModelUnavailable says why it is not."""
        self._write(spec)
        # Shielded: the worker may still answer after whoever waits has given up.
        await asyncio.shield(self._loaded)

    def send(self, op: str, body: dict[str, Any]) -> tuple[int, asyncio.Queue[dict[str, Any]]]:
        """Sends a request; returns its number and the inbox for what comes back.

        The last message has the op `done` or `error`; one with a `died` says that the worker ended.
        """
        number = next(self._numbers)
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inboxes[number] = inbox
        self.idle.clear()
        self._write({"op": op, "id": number, **body})
        return number, inbox

    def cancel(self, number: int) -> None:
        """Asks the worker to give up a request, if it still has it."""
        if number in self._inboxes:
            self._write({"op": "cancel", "id": number})

    async def stop(self) -> None:
        """Ends the worker's input, which ends it; kills it when it does not end."""
        self.stopping = True
        if not self._stdin.is_closing():
            with contextlib.suppress(OSError):  # it has ended already
                self._stdin.write_eof()
        try:
            async with asyncio.timeout(_EXIT_GRACE):
                await self.ended.wait()
        except TimeoutError:
            self.process.kill()
            await self.ended.wait()
        except asyncio.CancelledError:
            self.process.kill()
            raise
        await self._reader

    def how_it_ended(self) -> str:
        """Its exit status or the signal that ended it, in words."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"

    def _write(self, message: dict[str, Any]) -> None:
        # A closed socket shows as the end of the output, which the reader handles.
        if not self.stopping and not self._stdin.is_closing():
            self._stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        try:
            async for line in stdout:
                self._dispatch(json.loads(line))
        except ConnectionError:
            # It ended with something unread.
            pass
        except (ValueError, KeyError) as error:
            # Half a line, or one that is too long; the type only, as it may hold a prompt.
            log.error("the worker of %s wrote no message: %s", self.label, type(error).__name__)
            self.process.kill()
        await asyncio.to_thread(self.process.wait)
        self._stdin.close()
        self.ended.set()
        died = {"op": "error", "died": self.how_it_ended()}
        for inbox in self._inboxes.values():
            inbox.put_nowait(died)
        self._inboxes.clear()
        self.idle.set()
        if not self._loaded.done():
            self._loaded.set_exception(WorkerEnded(self))
            self._loaded.exception()

    def _dispatch(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "ready":
                self.info = message
                self._loaded.set_result(None)
            case "failed":
                self._loaded.set_exception(ModelUnavailable(message["detail"]))
                self._loaded.exception()  # whoever waited may have given up
            case _:
                total = message.get("total_tokens", self._tokens)
                self._on_tokens(total - self._tokens)
                self._tokens = total
                final = message["op"] in ("done", "error")
                number = message["id"]
                inbox = self._inboxes.pop(number) if final else self._inboxes[number]
                inbox.put_nowait(message)
                if not self._inboxes:
                    self.idle.set()


def _spawn(end: socket.socket) -> subprocess.Popen[bytes]:
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "llm_sidecar.models.local.worker"],
        stdin=end.fileno(),
        stdout=end.fileno(),
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
