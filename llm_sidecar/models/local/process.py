"""The server's side of one worker process: its socket, and an inbox for each of its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.models.local.failures import WorkerLost, error_of
from llm_sidecar.models.local.inbox import Inbox
from llm_sidecar.models.local.protocol import (
    FROM_WORKER,
    Answer,
    Begun,
    Cancel,
    Died,
    Failed,
    Generate,
    Job,
    Load,
    LoadFailed,
    Progress,
    Ready,
    ScoreQuestions,
    encode,
    is_final,
)
from llm_sidecar.tasks import TaskSet
from llm_sidecar.telemetry.calls import ModelCall

log = logging.getLogger(__name__)

_PROGRAM: Final = "llm_sidecar.models.local.worker"
_ROOT: Final = str(Path(__file__).resolve().parents[3])
_LINE_LIMIT: Final = 64 << 20
"""Bytes of one line from the worker."""
_EXIT_GRACE: Final = 3.0
"""Seconds a worker has to end after its input was closed."""
_CANCEL_GRACE: Final = 30.0
"""Seconds a worker has to end a cancelled job; then it counts as hung and is killed."""


class WorkerEnded(ModelUnavailable):
    """The process ended while it loaded its model.

    Attributes:
        worker: the process that ended.
    """

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__(f"its worker ended: {worker.how_it_ended()}")
        self.worker = worker


class UnusableFiles(ModelUnavailable):
    """The model cannot be loaded from these files."""


class WorkerProcess:
    """A process that runs `llm_sidecar.models.local.worker`.

    Attributes:
        label: of its model.
        adapter: name of the adapter that it loads with the model, or None.
        process: the process.
        ready: the message that the model is loaded; None until then.
        notes: where the sidecar deviates from the model's files, one sentence each.
        calls: the calls that it serves, by job number; once it has ended, the unanswered ones.
        idle: set while it has no job.
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
        self.ready: Ready | None = None
        self.notes: tuple[str, ...] = ()
        self.calls: dict[int, ModelCall] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self.ended = asyncio.Event()
        self.stopping = False
        self._on_tokens = on_tokens
        self._stdin = stdin
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._watchdogs = TaskSet()
        self._reader = asyncio.create_task(self._read(stdout))

    @classmethod
    async def start(
        cls,
        label: str,
        adapter: str | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> WorkerProcess:
        """Spawns a process in a session of its own, so that Ctrl-C reaches the server only.

        It uses `subprocess` on every event loop, because that calls vfork: uvloop's fork runs
        lancedb's handlers in the child, which may deadlock. It uses a socket, because uvloop closes
        the descriptor of a pipe twice, and the number may have been reused in between.

        Args:
            label, adapter: names of what the worker is going to load, for the attributes.
            on_tokens: called with the number of new completion tokens as they are generated.
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
        """Whether the process still runs, as far as is known."""
        return not self.ended.is_set()

    async def load(self, load: Load) -> Ready:
        """Returns when the model is loaded.

        Raises:
            UnusableFiles: it cannot be loaded from its files; says why.
            ModelUnavailable: it cannot be loaded now; says why.
        """
        self._write(load)
        # Shielded, because the worker may still answer after this wait is cancelled.
        return await asyncio.shield(self._loaded)

    def send(self, job: Job) -> tuple[int, Inbox]:
        """Sends a job; returns its number and its inbox."""
        number = next(self._numbers)
        self._write(msgspec.structs.replace(job, id=number))
        inbox = self._inboxes[number] = Inbox()
        self.idle.clear()
        return number, inbox

    async def serve(
        self,
        call: ModelCall,
        job: Generate | ScoreQuestions,
        deadline: Deadline,
        on_end: Callable[[], None],
    ) -> AsyncGenerator[Answer, None]:
        """Sends a job and yields its answers; closing it cancels the job.

        It yields nothing if the worker dies before it begins the job.

        Args:
            call: records which model answers.
            job, deadline: what it has to do, and by when.
            on_end: is called when the worker has ended the job.

        Raises:
            WorkerLost: the worker dies after it has begun.
            SidecarError: the job fails.
            TimeoutError: the deadline passes first.
        """
        assert self.ready is not None
        call.served_by, call.adapter = self.label, self.adapter
        call.identity = self.ready.identity
        number, inbox = self.send(job)
        self.calls[number] = call
        answer: Answer | None = None
        begun = False

        def ended() -> None:
            self.calls.pop(number, None)
            on_end()

        inbox.on_end = ended
        try:
            async with contextlib.aclosing(inbox.answers(deadline)) as answers:
                async for answer in answers:
                    begun = begun or isinstance(answer, Begun)
                    if not isinstance(answer, Failed | Died):
                        yield answer
        finally:
            if answer is None or not is_final(answer):
                # The call counts until the worker has ended it: the worker may hang.
                self.cancel(number, inbox)
            elif not isinstance(answer, Died):
                self.calls.pop(number, None)
        if isinstance(answer, Failed):
            raise error_of(answer, call.model)
        if isinstance(answer, Died) and begun:
            raise WorkerLost(call.model, answer.how)

    def cancel(self, number: int, inbox: Inbox) -> None:
        """Cancels a job, if the worker still has it; kills a worker that does not end it soon."""
        if number in self._inboxes:
            self._write(Cancel(number))
            self._watchdogs.start(self._kill_if_hung(inbox))

    async def stop(self) -> None:
        """Closes the worker's input, so that it ends; kills it if it does not."""
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

    async def _kill_if_hung(self, inbox: Inbox) -> None:
        try:
            async with asyncio.timeout(_CANCEL_GRACE):
                while not is_final(await inbox.get()):
                    pass
        except TimeoutError:
            log.error("%s does not end a cancelled request; killing it", self.label)
            self.process.kill()

    def _write(self, message: msgspec.Struct) -> None:
        line = encode(message)
        # A closed socket shows as the end of the output, which the reader handles.
        if not self.stopping and not self._stdin.is_closing():
            self._stdin.write(line)

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        try:
            async for line in stdout:
                self._dispatch(FROM_WORKER.decode(line))
        except ConnectionError:
            # It ended before it had read everything.
            pass
        except Exception as error:  # noqa: BLE001 - a worker that writes anything else is broken
            # An incomplete, overlong or unexpected message. Logs the error's type only: its message
            # may quote a prompt.
            log.error(
                "the worker of %s wrote an invalid message: %s", self.label, type(error).__name__
            )
            self.process.kill()
        await asyncio.to_thread(_end_all, self.process)
        self._stdin.close()
        self.ended.set()
        for number, inbox in self._inboxes.items():
            inbox.put_nowait(Died(id=number, how=self.how_it_ended()))
        self._inboxes.clear()
        self.idle.set()
        if not self._loaded.done():
            self._fail_load(WorkerEnded(self))

    def _dispatch(self, message: Ready | LoadFailed | Answer) -> None:
        match message:
            case Ready():
                self.ready = message
                self._loaded.set_result(message)
            case LoadFailed():
                kind = UnusableFiles if message.permanent else ModelUnavailable
                self._fail_load(kind(message.detail))
            case Answer():
                if isinstance(message, Progress):
                    self._on_tokens(message.new_tokens)
                self._inboxes[message.id].put_nowait(message)
                if is_final(message):
                    del self._inboxes[message.id]
                if not self._inboxes:
                    self.idle.set()

    def _fail_load(self, error: ModelUnavailable) -> None:
        self._loaded.set_exception(error)
        self._loaded.exception()  # a cancelled call no longer waits for it


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Waits for a worker's end and kills what it has left, such as the program that a script in
    LLAMA_SERVER runs."""
    process.wait()
    # The group exists as long as one of its processes does.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _spawn(end: socket.socket) -> subprocess.Popen[bytes]:
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", _PROGRAM],
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
