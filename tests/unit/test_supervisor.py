"""How a model's worker is started, replaced when it dies, and given another adapter.

Asked through a `ModelHost`, over worker processes that are fakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import AdapterRejected, ModelUnavailable, QueueFull
from llm_sidecar.logs import log_context
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import supervisor
from llm_sidecar.models.local.model import HostLimits, ModelHost
from llm_sidecar.telemetry.calls import WorkerDeath

WARM_UP = GenerationRequest([{"role": "user", "content": "Hello."}], 1)
ASKED = GenerationRequest([{"role": "user", "content": "What now?"}], 5)
PREFIX = GenerationRequest([{"role": "system", "content": "Propose."}], 248, "{}", 0.5)
ADAPTER = Path("/adapters/20260102")


class FakeProcess:
    """The process of a fake worker."""

    def __init__(self, worker: FakeWorker, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._worker = worker

    def kill(self) -> None:
        self._worker.die("signal SIGKILL")


class FakeWorker:
    """A worker that loads and answers as a test has it.

    Attributes:
        spec: what it was told to load.
        sent: the requests it got.
        info, label, process, tokens, ended, idle, adapter, stopping: as a `WorkerProcess` has them.
    """

    def __init__(self, label: str, adapter: str | None, on_tokens: Callable[[int], None]) -> None:
        self.label, self.adapter = label, adapter
        self.info = {"runtime": "fake", "device": "cpu", "context_length": 100, "together": 2}
        self.spec: dict[str, Any] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.tokens = 0
        self.ended, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        self.stopping = False
        self.process = FakeProcess(self, 0)
        self._on_tokens = on_tokens
        self._how = "exit status 0"
        self._inboxes: dict[int, asyncio.Queue[dict[str, Any]]] = {}

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    async def load(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        await house.load(self)

    def send(self, op: str, body: dict[str, Any]) -> tuple[int, asyncio.Queue[dict[str, Any]]]:
        self.sent.append((op, body))
        number, inbox = len(self.sent), asyncio.Queue[dict[str, Any]]()
        self._inboxes[number] = inbox
        if house.answers:
            self.answer(number)
        return number, inbox

    def answer(self, number: int) -> None:
        """Has a request answered with two tokens."""
        inbox = self._inboxes.pop(number)
        self.tokens += 2
        self._on_tokens(2)
        inbox.put_nowait({"op": "begun", "id": number, "adapter": self.adapter, "at": 0.0})
        inbox.put_nowait(
            {
                "op": "done",
                "id": number,
                "text": f"from {self.process.pid}",
                "finish_reason": "stop",
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "cached_tokens": 0,
                "total_tokens": self.tokens,
                "at": 0.0,
            }
        )

    def cancel(self, number: int) -> None:
        """Gives a request up."""
        if number in self._inboxes:
            self.answer(number)

    def die(self, how: str) -> None:
        """Ends, with its requests unanswered."""
        if self.alive:
            self._how = how
            self.ended.set()
            for inbox in self._inboxes.values():
                inbox.put_nowait({"op": "error", "died": how, "at": 0.0})

    async def stop(self) -> None:
        self.stopping = True
        self.die(self._how)

    def how_it_ended(self) -> str:
        return self._how


class House:
    """All workers of a test, and how they load.

    Attributes:
        workers: in the order of their start.
        answers: whether requests are answered at once.
        loading: unless it is set, workers do not become ready.
        failures: raised by the next loads, one each.
        paused: seconds that were waited between two starts.
    """

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.answers = True
        self.loading = asyncio.Event()
        self.loading.set()
        self.failures: list[Exception] = []
        self.paused: list[float] = []

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
        if self.failures:
            raise self.failures.pop(0)


house: House


@pytest.fixture(autouse=True)
async def fake_workers(monkeypatch: pytest.MonkeyPatch) -> House:
    global house
    made = house = House()

    class FakeWorkerProcess:
        start = made.start

    real_sleep = asyncio.sleep

    async def sleep(seconds: float, *rest: Any) -> None:
        if seconds > 0:
            made.paused.append(seconds)
        await real_sleep(0, *rest)

    monkeypatch.setattr(supervisor, "WorkerProcess", FakeWorkerProcess)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    return made


class Made:
    """A host, the deaths it was told of, and where its files are."""

    def __init__(self, **limits: float) -> None:
        self.deaths: list[WorkerDeath] = []
        self.missing: str | None = None
        self.host = ModelHost(
            "phi3",
            self._locate,
            device="cpu",
            threads=3,
            limits=HostLimits(**limits),  # type: ignore[arg-type]
            warm_up=WARM_UP,
            prefix=lambda: PREFIX,
            on_death=self.deaths.append,
        )

    def _locate(self) -> ModelFiles:
        if self.missing is not None:
            raise ModelUnavailable(self.missing, retry_after=30)
        return ModelFiles("phi3/fake", Path("/models/phi3"))


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.host.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


# Loading


async def test_nothing_is_started_before_the_first_request(made: Made) -> None:
    status = made.host.status()
    assert made.host.available()
    assert (status["state"], status["pid"], status["restarts"]) == ("unloaded", None, 0)
    assert house.workers == []


async def test_the_first_request_loads_the_model_as_it_is_configured(made: Made) -> None:
    completion = await made.host.generate(ASKED)
    assert (completion.text, completion.model) == ("from 1", "phi3/fake")
    (worker,) = house.workers
    assert worker.spec == {
        "device": "cpu",
        "threads": 3,
        "warm_up": asdict(WARM_UP),
        "folder": "/models/phi3",
        "prefix": asdict(PREFIX),
        "adapter": None,
    }
    status = made.host.status()
    expected = {
        "state": "ready",
        "reason": None,
        "model": "phi3/fake",
        "adapter": None,
        "runtime": "fake",
        "device": "cpu",
        "pid": 1,
        "restarts": 0,
        "completion_tokens_total": 2,
    }
    assert {name: status[name] for name in expected} == expected


async def test_one_worker_serves_all_requests(made: Made) -> None:
    await asyncio.gather(*(made.host.generate(ASKED) for _ in range(5)))
    (worker,) = house.workers
    assert [op for op, _ in worker.sent] == ["generate"] * 5
    assert made.host.status()["completion_tokens_total"] == 10


async def test_it_begins_with_the_adapter_that_it_is_given(made: Made) -> None:
    made.host.begin_with(ADAPTER)
    made.host.preload()
    await until(lambda: made.host.status()["state"] == "ready")
    assert house.workers[0].spec["adapter"] == "/adapters/20260102"
    assert made.host.status()["adapter"] == "20260102"


async def test_missing_files_are_said_and_nothing_is_started(made: Made) -> None:
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    assert not made.host.available()
    status = made.host.status()
    assert (status["state"], status["reason"]) == ("failed", made.missing)
    for asking in (made.host.generate(ASKED), made.host.generate(ASKED)):
        with pytest.raises(ModelUnavailable, match="set MICRO_LLM_MODEL_PATH") as caught:
            await asking
        assert caught.value.retry_after == 30
    assert house.workers == []


async def test_a_model_that_is_still_loading_is_waited_for_so_long() -> None:
    made = Made(load_wait=0.02)
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match=r"^The phi3 model is still loading\.$") as caught:
        await made.host.generate(ASKED)
    assert caught.value.retry_after == 5
    assert made.host.status()["state"] == "loading"
    house.loading.set()
    await until(lambda: made.host.status()["state"] == "ready")
    assert (await made.host.generate(ASKED)).text == "from 1"
    await made.host.close()


async def test_requests_wait_for_a_loading_model_until_their_deadlines() -> None:
    made = Made(request_timeout=0.1)
    house.loading.clear()
    soon = made.host.generate(ASKED, Deadline.after(0.02))
    # The second one has no turn yet, as nothing is known of the model.
    errors = await asyncio.gather(soon, made.host.generate(ASKED), return_exceptions=True)
    for error in errors:
        assert isinstance(error, ModelUnavailable)
        assert (error.detail, error.retry_after) == ("The phi3 model is still loading.", 5)
    waiting = asyncio.create_task(made.host.generate(ASKED, Deadline.after(5)))
    await until(lambda: made.host.status()["requests"] == 1)
    house.loading.set()
    assert (await waiting).text == "from 1"
    await made.host.close()


async def test_waiting_requests_fill_the_queue_and_can_be_cancelled() -> None:
    made = Made(queue_length=1)
    house.loading.clear()
    waiting = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: made.host.status()["requests"] == 1)
    with pytest.raises(QueueFull):
        await made.host.generate(ASKED)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert made.host.status()["requests"] == 0
    await made.host.close()


async def test_requests_that_wait_are_refused_once_the_server_drains(made: Made) -> None:
    house.loading.clear()
    waiting = [asyncio.create_task(made.host.generate(ASKED)) for _ in range(3)]
    await until(lambda: made.host.status()["requests"] == 3)
    made.host.refuse_waiting()
    for task in (*waiting, asyncio.create_task(made.host.generate(ASKED))):
        with pytest.raises(ModelUnavailable, match="shutting down") as caught:
            await task
        assert caught.value.retry_after == 5
    house.loading.set()
    await until(lambda: made.host.status()["state"] == "ready")
    # A proposal that runs still needs its model.
    assert (await made.host.generate(ASKED)).text == "from 1"


async def test_a_model_that_takes_too_long_to_load_is_ended() -> None:
    made = Made(load_timeout=0.02, load_wait=1.0)
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match=r"could not be loaded: .*within 0\.02 s"):
        await made.host.generate(ASKED)
    assert not house.workers[0].alive
    await made.host.close()


# Readiness


async def test_a_lazy_model_is_ready_while_it_can_be_loaded_in_time(made: Made) -> None:
    assert made.host.not_ready() is None
    house.loading.clear()
    asking = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: house.workers)
    assert made.host.not_ready() is None
    house.loading.set()
    await asking
    assert made.host.not_ready() is None


@pytest.mark.parametrize("limits", [{"load_wait": 0.01}, {"request_timeout": 0.01}])
async def test_a_load_that_takes_longer_than_requests_wait_is_not_ready(
    limits: dict[str, float],
) -> None:
    made = Made(**limits)
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match="still loading"):
        await made.host.generate(ASKED)
    assert made.host.not_ready() == "The phi3 model is loading."
    house.loading.set()
    await until(lambda: made.host.not_ready() is None)
    await made.host.close()


async def test_a_model_that_is_preloaded_is_ready_once_it_is_loaded(made: Made) -> None:
    house.loading.clear()
    made.host.preload()
    assert made.host.not_ready() == "The phi3 model is loading."
    house.loading.set()
    await until(lambda: made.host.status()["state"] == "ready")
    assert made.host.not_ready() is None


async def test_a_model_without_files_is_not_ready(made: Made) -> None:
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    assert made.host.not_ready() == made.missing


async def test_a_model_that_failed_is_not_ready_before_it_has_loaded(
    made: Made, between_loads: asyncio.Event
) -> None:
    await made.host.generate(ASKED)
    house.loading.clear()
    house.workers[0].die("signal SIGKILL")
    reason = "The phi3 worker ended (signal SIGKILL)"
    await until(lambda: made.host.status()["state"] == "failed")
    assert made.host.not_ready() == reason
    between_loads.set()
    await until(lambda: made.host.status()["state"] == "loading")
    assert made.host.not_ready() == reason
    house.loading.set()
    await until(lambda: made.host.not_ready() is None)
    assert made.host.status()["state"] == "ready"


# Failures


async def test_a_model_that_does_not_load_says_why_and_is_tried_again(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    house.failures = [ModelUnavailable("the file is damaged")]
    with pytest.raises(ModelUnavailable) as caught:
        await made.host.generate(ASKED)
    assert caught.value.detail == "The phi3 model could not be loaded: the file is damaged"
    assert caught.value.retry_after == 1
    assert "the file is damaged; starting it again in 0.5 s" in caplog.messages
    await until(lambda: made.host.status()["state"] == "ready")
    assert (await made.host.generate(ASKED)).text == "from 2"
    assert made.host.status()["restarts"] == 1
    assert not house.workers[0].alive
    # A failed load is no death of a worker.
    assert made.deaths == []


@pytest.fixture
def between_loads(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Unless it is set, the pause between two loads does not end."""
    over, next_step = asyncio.Event(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        await (over.wait() if seconds > 0 else next_step(0))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return over


async def test_after_a_failed_load_requests_do_not_wait_for_the_next(
    made: Made, between_loads: asyncio.Event
) -> None:
    house.failures = [ModelUnavailable("the file is damaged")]
    with pytest.raises(ModelUnavailable, match="could not be loaded"):
        await made.host.generate(ASKED)
    with pytest.raises(ModelUnavailable) as caught:
        await made.host.generate(ASKED)
    assert caught.value.detail == "The phi3 model is not available: the file is damaged."
    assert caught.value.retry_after == 1
    between_loads.set()
    await until(lambda: made.host.status()["state"] == "ready")
    assert (await made.host.generate(ASKED)).text == "from 2"


async def test_a_worker_that_dies_is_waited_for_unless_the_files_are_gone(
    made: Made, between_loads: asyncio.Event
) -> None:
    await made.host.generate(ASKED)
    house.workers[0].die("signal SIGKILL")
    await until(lambda: made.host.status()["state"] == "failed")
    waiting = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: made.host.status()["requests"] == 1)
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    with pytest.raises(ModelUnavailable) as caught:
        await made.host.generate(ASKED)
    assert (caught.value.detail, caught.value.retry_after) == (made.missing, 30)
    made.missing = None
    between_loads.set()
    assert (await waiting).text == "from 2"


async def test_the_pauses_between_two_loads_double_up_to_thirty_seconds(made: Made) -> None:
    house.failures = [ModelUnavailable("damaged")] * 9
    made.host.preload()
    await until(lambda: made.host.status()["state"] == "ready")
    assert house.paused == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert made.host.status()["restarts"] == 9


async def test_a_worker_that_dies_is_replaced_and_its_death_told(made: Made) -> None:
    await made.host.generate(ASKED)
    house.workers[0].die("signal SIGSEGV")
    assert (await made.host.generate(ASKED)).text == "from 2"
    (death,) = made.deaths
    assert (death.model, death.how, death.call) == ("phi3", "signal SIGSEGV", None)
    status = made.host.status()
    assert (status["restarts"], status["pid"]) == (1, 2)
    # What the first one generated is not forgotten.
    assert status["completion_tokens_total"] == 4


async def test_the_death_of_a_worker_is_logged_with_no_requests_id(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[str | None] = []

    def note(record: logging.LogRecord) -> bool:
        ids.append(log_context.get().get("request_id"))
        return True

    caplog.handler.addFilter(note)
    token = log_context.set({"request_id": "one"})
    await made.host.generate(ASKED)
    house.workers[0].die("signal SIGSEGV")
    await until(lambda: made.host.status()["restarts"] == 1)
    log_context.reset(token)
    caplog.handler.removeFilter(note)
    assert caplog.messages == ["The phi3 worker ended (signal SIGSEGV); starting it again in 0.5 s"]
    assert ids == [None]


async def test_a_request_that_has_begun_fails_with_its_worker(made: Made) -> None:
    house.answers = False
    asking = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: house.workers and house.workers[0].sent)
    (worker,) = house.workers
    worker._inboxes[1].put_nowait({"op": "begun", "id": 1, "adapter": None, "at": 0.0})
    await asyncio.sleep(0)
    worker.die("signal SIGKILL")
    with pytest.raises(ModelUnavailable, match=r"ended while it answered \(signal SIGKILL\)"):
        await asking
    house.answers = True
    assert (await made.host.generate(ASKED)).text == "from 2"
    assert [death.how for death in made.deaths] == ["signal SIGKILL"]


async def test_a_request_that_has_not_begun_goes_to_the_next_worker(made: Made) -> None:
    house.answers = False
    asking = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: house.workers and house.workers[0].sent)
    house.answers = True
    house.workers[0].die("signal SIGKILL")
    assert (await asking).text == "from 2"


# Closing


async def test_closing_ends_the_worker_and_refuses_requests() -> None:
    made = Made()
    await made.host.generate(ASKED)
    await made.host.close()
    assert not house.workers[0].alive
    with pytest.raises(ModelUnavailable, match="shutting down") as caught:
        await made.host.generate(ASKED)
    assert caught.value.retry_after == 5
    assert made.deaths == []
    assert len(house.workers) == 1


async def test_closing_tells_those_that_wait_for_a_load() -> None:
    made = Made()
    house.loading.clear()
    asking = asyncio.create_task(made.host.generate(ASKED))
    await until(lambda: house.workers)
    await made.host.close()
    with pytest.raises(ModelUnavailable, match="shutting down"):
        await asking
    assert not house.workers[0].alive


# Adapters


async def test_an_adapter_is_taken_by_a_second_worker_and_the_first_one_ends(made: Made) -> None:
    await made.host.generate(ASKED)
    await made.host.swap_adapter(ADAPTER)
    assert house.workers[1].spec["adapter"] == "/adapters/20260102"
    assert made.host.adapter == ADAPTER
    assert made.host.status()["adapter"] == "20260102"
    assert (await made.host.generate(ASKED)).text == "from 2"
    await until(lambda: not house.workers[0].alive)
    # Nobody but the swap ended it.
    assert (made.deaths, made.host.status()["restarts"]) == ([], 0)


async def test_an_adapter_that_does_not_load_is_refused_and_all_goes_on(made: Made) -> None:
    await made.host.generate(ASKED)
    house.failures = [ModelUnavailable("it is for another model")]
    with pytest.raises(AdapterRejected) as caught:
        await made.host.swap_adapter(ADAPTER)
    assert caught.value.detail == "The adapter 20260102 is refused: it is for another model"
    assert made.host.adapter is None
    assert (await made.host.generate(ASKED)).text == "from 1"
    assert [worker.alive for worker in house.workers] == [True, False]


async def test_a_swap_that_is_cancelled_changes_nothing(made: Made) -> None:
    await made.host.generate(ASKED)
    house.loading.clear()
    swapping = asyncio.create_task(made.host.swap_adapter(ADAPTER))
    await until(lambda: len(house.workers) == 2)
    swapping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await swapping
    assert swapping.cancelled()
    await until(lambda: not house.workers[1].alive)
    assert made.host.adapter is None
    assert (await made.host.generate(ASKED)).text == "from 1"
