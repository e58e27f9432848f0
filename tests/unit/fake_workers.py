"""Worker processes that load and answer as a test specifies, for tests of a `LocalModel`.

`use_fake_workers` replaces the processes; `house` has them all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, Final, Literal

import pytest

from llm_sidecar.engines import GenerationRequest
from llm_sidecar.models.base import Speed
from llm_sidecar.models.fake import IDENTITY
from llm_sidecar.models.local import loader
from llm_sidecar.models.local.inbox import Inbox
from llm_sidecar.models.local.process import WorkerProcess
from llm_sidecar.models.local.protocol import Begun, Died, Job, Load, Progress, Ready
from llm_sidecar.telemetry.calls import ModelCall

ASKED: Final = GenerationRequest([{"role": "user", "content": "What now?"}], 5)
SPEED: Final = Speed(prefill=14.25, decode=3.9)


class FakeProcess:
    """The process of a fake worker."""

    def __init__(self, worker: FakeWorker, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._worker = worker

    def kill(self) -> None:
        self._worker.die("signal SIGKILL")


class FakeWorker:
    """A worker that loads and answers as a test specifies.

    Attributes:
        loaded: the message that it was loaded with.
        sent: the jobs that it got.
        label, adapter, process, ready, calls, idle, stopping, ended: see `WorkerProcess`.
    """

    def __init__(self, label: str, adapter: str | None, on_tokens: Callable[[int], None]) -> None:
        self.label, self.adapter = label, adapter
        self.ready = Ready(IDENTITY, context_length=100, capacity=2, speed=SPEED, notes=house.notes)
        self.notes: tuple[str, ...] = ()
        self.loaded: Load | None = None
        self.sent: list[Job] = []
        self.calls: dict[int, ModelCall] = {}
        self.ended, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        self.stopping = False
        self.process = FakeProcess(self, 0)
        self._on_tokens = on_tokens
        self._how = "exit status 0"
        self.inboxes: dict[int, Inbox] = {}

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    async def load(self, load: Load) -> Ready:
        self.loaded = load
        await house.load(self)
        return self.ready

    # The real one, over this worker's `send` and `cancel`.
    serve = WorkerProcess.serve

    def send(self, job: Job) -> tuple[int, Inbox]:
        self.sent.append(job)
        number = len(self.sent)
        inbox = self.inboxes[number] = Inbox()
        if house.answers:
            self.answer(number)
        return number, inbox

    def answer(self, number: int) -> None:
        """Answers a request with two tokens."""
        inbox = self.inboxes.pop(number)
        self._on_tokens(2)
        inbox.put_nowait(Begun(id=number, at=0.0))
        inbox.put_nowait(progress(number, f"from {self.process.pid}", 2, "stop"))

    def cancel(self, number: int, inbox: Inbox) -> None:
        """Ends a job."""
        if number in self.inboxes:
            self.answer(number)

    def die(self, how: str) -> None:
        """Ends and leaves its jobs unanswered."""
        if self.alive:
            self._how = how
            self.ended.set()
            for number, inbox in self.inboxes.items():
                inbox.put_nowait(Died(id=number, how=how))

    async def stop(self) -> None:
        self.stopping = True
        self.die(self._how)

    def how_it_ended(self) -> str:
        return self._how


def progress(
    number: int, text: str, tokens: int, finish_reason: Literal["stop"] | None = None
) -> Progress:
    """All text of a completion so far, in one message."""
    return Progress(
        id=number,
        at=0.0,
        text=text,
        prompt_tokens=3,
        completion_tokens=tokens,
        cached_tokens=0,
        new_tokens=tokens,
        finish_reason=finish_reason,
    )


class House:
    """All workers of a test, and how they load.

    Attributes:
        workers: in the order of their start.
        answers: whether requests are answered at once.
        loading: unless it is set, workers do not become ready.
        failures: raised by the next loads, one each; None for a load that succeeds.
        paused: seconds that were waited between two starts.
        notes: of the workers.
    """

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.answers = True
        self.loading = asyncio.Event()
        self.loading.set()
        self.failures: list[Exception | None] = []
        self.paused: list[float] = []
        self.notes: tuple[str, ...] = ()

    async def start(
        self,
        label: str,
        adapter: str | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> FakeWorker:
        worker = FakeWorker(label, adapter, on_tokens)
        self.workers.append(worker)
        worker.process.pid = len(self.workers)
        return worker

    async def load(self, worker: FakeWorker) -> None:
        await self.loading.wait()
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure


house: Final = House()
"""The workers of the running test."""


def use_fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empties the house, from which all workers come, and lets no pause take time."""
    house.__init__()  # type: ignore[misc]

    class FakeWorkerProcess:
        start = house.start

    real_sleep = asyncio.sleep

    async def sleep(seconds: float, *rest: Any) -> None:
        if seconds > 0:
            house.paused.append(seconds)
        await real_sleep(0, *rest)

    monkeypatch.setattr(loader, "WorkerProcess", FakeWorkerProcess)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
