"""How a model's worker is started, replaced when it dies, and given another adapter.

Tested through a `LocalModel` over fake worker processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import EngineOptions, GenerationRequest
from llm_sidecar.engines.base import TokenLogprob
from llm_sidecar.errors import AdapterRejected, DeadlineExceeded, ModelUnavailable, QueueFull
from llm_sidecar.logs import log_context
from llm_sidecar.models.base import Adapter, ChoiceScores, Delta, ModelStatus, Speed
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import loader
from llm_sidecar.models.local import model as local_model
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.local.process import UnusableFiles
from llm_sidecar.models.local.protocol import (
    Begun,
    Check,
    Done,
    Generate,
    Load,
    Prefill,
    PromptLogprobs,
    PromptText,
    Scores,
)
from llm_sidecar.telemetry.calls import WorkerDeath
from tests.completions import complete
from tests.unit.fake_workers import ASKED, SPEED, FakeWorker, house, progress, use_fake_workers

PREFIX = GenerationRequest([{"role": "system", "content": "Propose."}], 248, "{}", 0.5)
OTHER_PREFIX = GenerationRequest([{"role": "system", "content": "Other."}], 248, "{}", 0.5)
ADAPTER = Adapter(Path("/adapters/20260102"))


@pytest.fixture(autouse=True)
async def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_workers(monkeypatch)


class Made:
    """A model, the deaths that it reported, and where its files are."""

    def __init__(self, *, preload: bool = False, **limits: float) -> None:
        self.deaths: list[WorkerDeath] = []
        self.on_ready: Callable[[], None] = lambda: None
        self.missing: str | None = None
        self.notes: tuple[str, ...] = ()
        self.model = LocalModel(
            "phi3",
            self._locate,
            options=EngineOptions("cpu", 3),
            limits=ModelLimits(**limits),  # type: ignore[arg-type]
            preload=preload,
            on_death=self.deaths.append,
            on_ready=lambda: self.on_ready(),
        )

    def _locate(self) -> ModelFiles:
        if self.missing is not None:
            raise ModelUnavailable(self.missing, retry_after=30)
        return ModelFiles("phi3/fake", Path("/models/phi3"), self.notes)


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.model.close()


@pytest.fixture
async def preloaded() -> AsyncIterator[Made]:
    made = Made(preload=True)
    yield made
    await made.model.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


# Loading


async def test_nothing_is_started_before_the_first_request(made: Made) -> None:
    assert made.model.status() == ModelStatus(state="unloaded", queue_length=64)
    assert house.workers == []


async def test_the_first_request_loads_the_model_as_it_is_configured(made: Made) -> None:
    completion = await complete(made.model, ASKED)
    assert (completion.text, completion.model) == ("from 1", "phi3/fake")
    (worker,) = house.workers
    assert worker.loaded == Load("/models/phi3", EngineOptions("cpu", 3))
    assert made.model.status() == ModelStatus(
        state="ready",
        model="phi3/fake",
        runtime="fake",
        device="cpu",
        pid=1,
        completion_tokens_total=2,
        queue_length=64,
        speed=SPEED,
    )


async def test_each_worker_that_begins_to_serve_is_reported_with_its_speed(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    speeds: list[Speed | None] = []
    made.on_ready = lambda: speeds.append(made.model.status().speed)
    assert made.model.status().speed is None
    await complete(made.model, ASKED)
    await made.model.use_adapter(ADAPTER)
    assert speeds == [SPEED, SPEED]
    said = [text.partition(": ")[2] for text in caplog.messages if " is ready after " in text]
    assert said == ["phi3/fake on fake, cpu; prefill 14.2 tokens/s, decode 3.9 tokens/s"] * 2


async def test_one_worker_serves_all_requests(made: Made) -> None:
    await asyncio.gather(*(complete(made.model, ASKED) for _ in range(5)))
    (worker,) = house.workers
    assert worker.sent == [Generate(request=ASKED)] * 5
    assert made.model.status().completion_tokens_total == 10


async def test_it_starts_with_the_adapter_that_it_is_given(preloaded: Made) -> None:
    await preloaded.model.start(ADAPTER)
    await until(lambda: preloaded.model.status().state == "ready")
    (worker,) = house.workers
    assert worker.loaded is not None
    assert worker.loaded.adapter == "/adapters/20260102"
    assert preloaded.model.status().adapter == ADAPTER


async def test_a_lazy_model_starts_with_its_adapter_at_the_first_request(made: Made) -> None:
    await made.model.start(ADAPTER)
    assert house.workers == []
    await complete(made.model, ASKED)
    assert house.workers[0].loaded is not None
    assert house.workers[0].loaded.adapter == "/adapters/20260102"


async def test_a_preloaded_model_logs_that_its_files_are_missing(
    preloaded: Made, caplog: pytest.LogCaptureFixture
) -> None:
    preloaded.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    await preloaded.model.start()
    assert caplog.messages == [preloaded.missing]
    assert preloaded.model.status().not_ready == preloaded.missing
    assert house.workers == []


# Prefixes


async def test_each_worker_loads_with_the_latest_prefix(made: Made) -> None:
    await made.model.prefill(OTHER_PREFIX)
    await made.model.prefill(PREFIX)
    assert house.workers == []
    await complete(made.model, ASKED)
    await made.model.use_adapter(ADAPTER)
    assert [worker.loaded and worker.loaded.prefix for worker in house.workers] == [PREFIX] * 2
    assert [Prefill in map(type, worker.sent) for worker in house.workers] == [False, False]


async def test_a_live_worker_is_sent_a_new_prefix_at_once(made: Made) -> None:
    await complete(made.model, ASKED)
    house.answers = False
    prefilling = asyncio.create_task(made.model.prefill(PREFIX))
    (worker,) = house.workers
    await until(lambda: len(worker.sent) == 2)
    assert worker.sent[1] == Prefill(request=PREFIX)
    await asyncio.sleep(0)
    assert not prefilling.done()
    worker.inboxes.pop(2).put_nowait(Done(id=2))
    await prefilling


async def test_a_worker_that_loads_is_sent_the_new_prefix_afterwards(made: Made) -> None:
    await made.model.prefill(OTHER_PREFIX)
    house.loading.clear()
    asking = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: house.workers and house.workers[0].loaded)
    await made.model.prefill(PREFIX)
    (worker,) = house.workers
    assert worker.sent == []
    house.loading.set()
    await asking
    assert worker.loaded == Load("/models/phi3", EngineOptions("cpu", 3), prefix=OTHER_PREFIX)
    assert worker.sent[0] == Prefill(request=PREFIX)


# Files


async def test_missing_files_are_reported_and_nothing_is_started(made: Made) -> None:
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    assert made.model.status().not_ready is not None
    status = made.model.status()
    assert (status.state, status.reason) == ("failed", made.missing)
    for asking in (complete(made.model, ASKED), complete(made.model, ASKED)):
        with pytest.raises(ModelUnavailable, match="set MICRO_LLM_MODEL_PATH") as caught:
            await asking
        assert caught.value.retry_after == 30
    assert house.workers == []


async def test_a_model_that_is_still_loading_is_waited_for_so_long() -> None:
    made = Made(load_wait=0.02)
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match=r"^The phi3 model is still loading\.$") as caught:
        await complete(made.model, ASKED)
    assert caught.value.retry_after == 5
    assert made.model.status().state == "loading"
    house.loading.set()
    await until(lambda: made.model.status().state == "ready")
    assert (await complete(made.model, ASKED)).text == "from 1"
    await made.model.close()


async def test_requests_wait_for_a_loading_model_until_their_deadlines() -> None:
    made = Made(request_timeout=0.1)
    house.loading.clear()
    soon = complete(made.model, ASKED, Deadline.after(0.02))
    # The second one has no turn yet, as nothing is known of the model.
    errors = await asyncio.gather(soon, complete(made.model, ASKED), return_exceptions=True)
    for error in errors:
        assert isinstance(error, ModelUnavailable)
        assert (error.detail, error.retry_after) == ("The phi3 model is still loading.", 5)
    waiting = asyncio.create_task(complete(made.model, ASKED, Deadline.after(5)))
    await until(lambda: made.model.status().requests == 1)
    house.loading.set()
    assert (await waiting).text == "from 1"
    await made.model.close()


async def test_waiting_requests_fill_the_queue_and_can_be_cancelled() -> None:
    made = Made(queue_length=1)
    house.loading.clear()
    waiting = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: made.model.status().requests == 1)
    with pytest.raises(QueueFull):
        await complete(made.model, ASKED)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert made.model.status().requests == 0
    await made.model.close()


async def test_requests_that_wait_are_refused_once_the_server_drains(made: Made) -> None:
    house.loading.clear()
    waiting = [asyncio.create_task(complete(made.model, ASKED)) for _ in range(3)]
    await until(lambda: made.model.status().requests == 3)
    made.model.drain()
    for task in (*waiting, asyncio.create_task(complete(made.model, ASKED))):
        with pytest.raises(ModelUnavailable, match="shutting down") as caught:
            await task
        assert caught.value.retry_after == 5
    house.loading.set()
    await until(lambda: made.model.status().state == "ready")
    # A proposal that runs still needs its model.
    assert (await complete(made.model, ASKED)).text == "from 1"


async def test_a_model_that_takes_too_long_to_load_is_ended() -> None:
    made = Made(load_timeout=0.02, load_wait=1.0)
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match=r"could not be loaded: .*within 0\.02 s"):
        await complete(made.model, ASKED)
    assert not house.workers[0].alive
    await made.model.close()


# Readiness


async def test_a_lazy_model_is_ready_while_it_can_be_loaded_in_time(made: Made) -> None:
    assert made.model.status().not_ready is None
    house.loading.clear()
    asking = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: house.workers)
    assert made.model.status().not_ready is None
    house.loading.set()
    await asking
    assert made.model.status().not_ready is None


@pytest.mark.parametrize("limits", [{"load_wait": 0.01}, {"request_timeout": 0.01}])
async def test_a_load_that_takes_longer_than_requests_wait_is_not_ready(
    limits: dict[str, float],
) -> None:
    made = Made(**limits)  # type: ignore[arg-type]
    house.loading.clear()
    with pytest.raises(ModelUnavailable, match="still loading"):
        await complete(made.model, ASKED)
    assert made.model.status().not_ready == "The phi3 model is loading."
    house.loading.set()
    await until(lambda: made.model.status().not_ready is None)
    await made.model.close()


async def test_a_model_that_is_preloaded_is_ready_once_it_is_loaded(preloaded: Made) -> None:
    made = preloaded
    house.loading.clear()
    await made.model.start()
    assert made.model.status().not_ready == "The phi3 model is loading."
    house.loading.set()
    await until(lambda: made.model.status().state == "ready")
    assert made.model.status().not_ready is None


async def test_a_model_without_files_is_not_ready(made: Made) -> None:
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    assert made.model.status().not_ready == made.missing


async def test_a_model_that_failed_is_not_ready_before_it_has_loaded(
    made: Made, between_loads: asyncio.Event
) -> None:
    await complete(made.model, ASKED)
    house.loading.clear()
    house.workers[0].die("signal SIGKILL")
    reason = "The phi3 worker ended (signal SIGKILL)"
    await until(lambda: made.model.status().state == "failed")
    assert made.model.status().not_ready == reason
    between_loads.set()
    await until(lambda: made.model.status().state == "loading")
    assert made.model.status().not_ready == reason
    house.loading.set()
    await until(lambda: made.model.status().not_ready is None)
    assert made.model.status().state == "ready"


# Failures


async def test_a_model_that_does_not_load_reports_why_and_is_tried_again(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    house.failures = [ModelUnavailable("the file is damaged")]
    with pytest.raises(ModelUnavailable) as caught:
        await complete(made.model, ASKED)
    assert caught.value.detail == "The phi3 model could not be loaded: the file is damaged"
    assert caught.value.retry_after == 1
    assert "the file is damaged; starting it again in 0.5 s" in caplog.messages
    await until(lambda: made.model.status().state == "ready")
    assert (await complete(made.model, ASKED)).text == "from 2"
    assert made.model.status().restarts == 1
    assert not house.workers[0].alive
    # A failed load does not count as a worker's death.
    assert made.deaths == []


@pytest.fixture
def between_loads(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Unless it is set, the pause between two loads does not end."""
    over, next_step = asyncio.Event(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        await (over.wait() if seconds > 0 else next_step(0))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return over


async def test_files_that_cannot_be_loaded_are_loaded_again_once_they_have_changed(
    made: Made,
    between_loads: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The third look finds a copy under way, the fifth one finds it complete.
    seen = itertools.chain(["old", "old", "part", "new", "new"], itertools.repeat("new"))
    looks: list[str] = []

    def file_stats(self: loader.WorkerLoader, adapter: Adapter | None) -> object:
        looks.append(next(seen))
        return looks[-1]

    monkeypatch.setattr(loader.WorkerLoader, "file_stats", file_stats)
    house.failures = [UnusableFiles("it has no chat template")]
    for _ in range(2):
        with pytest.raises(ModelUnavailable) as caught:
            await complete(made.model, ASKED)
        assert caught.value.detail == "The phi3 model is not available: it has no chat template."
        assert caught.value.retry_after == 30
    status = made.model.status()
    assert (status.state, status.reason, status.restarts) == ("failed", status.not_ready, 0)
    assert status.reason == "it has no chat template"
    assert len(house.workers) == 1
    assert caplog.messages == [
        "phi3: it has no chat template; it is loaded again when its files change"
    ]
    between_loads.set()
    await until(lambda: made.model.status().state == "ready")
    assert looks == ["old", "old", "part", "new", "new", "new"]
    assert (len(house.workers), made.model.status().restarts) == (2, 0)


@pytest.mark.parametrize("change", ["replaced", "completed", "allowed", "removed"])
def test_every_change_of_the_files_is_seen(made: Made, tmp_path: Path, change: str) -> None:
    link, program = tmp_path / "model.safetensors", tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.touch(0o600)
    # As the cache of a download that is not complete.
    link.symlink_to("bin/weights")
    (tmp_path / "config.json").touch()
    options = EngineOptions(llama_server=str(program))
    found = loader.WorkerLoader("phi3", lambda: ModelFiles("phi3/m", tmp_path), options, 1.0)
    before = found.file_stats(None)
    assert before == found.file_stats(None) is not None
    match change:
        case "replaced":
            (tmp_path / "config.json").write_text("{}")
        case "completed":
            (tmp_path / "bin" / "weights").touch()
        case "allowed":
            program.chmod(0o700)
        case "removed":
            link.unlink()
    assert found.file_stats(None) not in (before, None)


async def test_deviations_from_the_files_are_logged_and_reported(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.notes, house.notes = ("its subfolder is loaded",), ("a thought is closed",)
    assert made.model.status().notes == ()
    await complete(made.model, ASKED)
    assert made.model.status().notes == (*made.notes, *house.notes)
    assert caplog.messages == ["phi3: its subfolder is loaded", "phi3: a thought is closed"]


async def test_after_a_failed_load_requests_do_not_wait_for_the_next(
    made: Made, between_loads: asyncio.Event
) -> None:
    house.failures = [ModelUnavailable("the file is damaged")]
    with pytest.raises(ModelUnavailable, match="could not be loaded"):
        await complete(made.model, ASKED)
    with pytest.raises(ModelUnavailable) as caught:
        await complete(made.model, ASKED)
    assert caught.value.detail == "The phi3 model is not available: the file is damaged."
    assert caught.value.retry_after == 1
    between_loads.set()
    await until(lambda: made.model.status().state == "ready")
    assert (await complete(made.model, ASKED)).text == "from 2"


async def test_a_worker_that_dies_is_waited_for_unless_the_files_are_gone(
    made: Made, between_loads: asyncio.Event
) -> None:
    await complete(made.model, ASKED)
    house.workers[0].die("signal SIGKILL")
    await until(lambda: made.model.status().state == "failed")
    waiting = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: made.model.status().requests == 1)
    made.missing = "The phi3 model is missing; set MICRO_LLM_MODEL_PATH."
    with pytest.raises(ModelUnavailable) as caught:
        await complete(made.model, ASKED)
    assert (caught.value.detail, caught.value.retry_after) == (made.missing, 30)
    made.missing = None
    between_loads.set()
    assert (await waiting).text == "from 2"


async def test_the_pauses_between_two_loads_double_up_to_thirty_seconds(preloaded: Made) -> None:
    made = preloaded
    house.failures = [ModelUnavailable("damaged")] * 9
    await made.model.start()
    await until(lambda: made.model.status().state == "ready")
    assert house.paused == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert made.model.status().restarts == 9


async def test_a_worker_that_dies_is_replaced_and_its_death_reported(made: Made) -> None:
    await complete(made.model, ASKED)
    house.workers[0].die("signal SIGSEGV")
    assert (await complete(made.model, ASKED)).text == "from 2"
    (death,) = made.deaths
    assert (death.model, death.how, death.call) == ("phi3", "signal SIGSEGV", None)
    status = made.model.status()
    assert (status.restarts, status.pid) == (1, 2)
    # The tokens of the first worker still count.
    assert status.completion_tokens_total == 4


async def test_the_death_of_a_worker_is_logged_with_no_requests_id(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[str | None] = []

    def note(record: logging.LogRecord) -> bool:
        ids.append(log_context.get().get("request_id"))
        return True

    caplog.handler.addFilter(note)
    token = log_context.set({"request_id": "one"})
    await complete(made.model, ASKED)
    house.workers[0].die("signal SIGSEGV")
    await until(lambda: made.model.status().restarts == 1)
    log_context.reset(token)
    caplog.handler.removeFilter(note)
    assert caplog.messages == ["The phi3 worker ended (signal SIGSEGV); starting it again in 0.5 s"]
    assert ids == [None]


async def test_a_request_that_has_begun_fails_with_its_worker(made: Made) -> None:
    house.answers = False
    asking = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: house.workers and house.workers[0].sent)
    (worker,) = house.workers
    worker.inboxes[1].put_nowait(Begun(id=1, at=0.0))
    await asyncio.sleep(0)
    worker.die("signal SIGKILL")
    with pytest.raises(ModelUnavailable, match=r"ended while it answered \(signal SIGKILL\)"):
        await asking
    house.answers = True
    assert (await complete(made.model, ASKED)).text == "from 2"
    assert [death.how for death in made.deaths] == ["signal SIGKILL"]


async def test_a_request_that_has_not_begun_goes_to_the_next_worker(made: Made) -> None:
    house.answers = False
    asking = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: house.workers and house.workers[0].sent)
    house.answers = True
    house.workers[0].die("signal SIGKILL")
    assert (await asking).text == "from 2"


async def test_a_request_that_has_queued_longer_than_a_load_may_take_gets_the_next_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Made(load_wait=60.0)
    await complete(made.model, ASKED)
    house.answers = False
    running = [asyncio.create_task(complete(made.model, ASKED)) for _ in range(2)]
    (worker,) = house.workers
    await until(lambda: len(worker.inboxes) == 2)
    for number, inbox in worker.inboxes.items():
        inbox.put_nowait(Begun(id=number, at=0.0))
    # To the model, this one has come an hour ago.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() - 3600.0)
    monkeypatch.setattr(local_model, "time", clock)
    waiting = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: isinstance(worker.sent[-1], Check))
    worker.answer(len(worker.sent))
    house.loading.clear()
    worker.die("signal SIGKILL")
    for task in running:
        with pytest.raises(ModelUnavailable, match="signal SIGKILL"):
            await task
    await until(lambda: len(house.workers) == 2)
    house.answers = True
    house.loading.set()
    assert (await waiting).text == "from 2"
    await made.model.close()


# Streams


async def test_a_stream_that_is_closed_cancels_its_job(made: Made) -> None:
    house.answers = False
    stream = made.model.stream(ASKED)
    asking = asyncio.create_task(anext(stream))
    await until(lambda: house.workers and house.workers[0].sent)
    (worker,) = house.workers
    worker.inboxes[1].put_nowait(progress(1, "one", 1))
    delta = await asking
    assert (delta.text, delta.finish_reason, delta.completion_tokens) == ("one", None, 1)
    assert (made.model.status().requests, made.model.status().running) == (1, 1)
    await stream.aclose()
    assert worker.inboxes == {}
    assert (made.model.status().requests, made.model.status().running) == (0, 0)


async def test_a_slow_reader_delays_no_request_and_gets_everything_at_once(
    made: Made,
) -> None:
    house.answers = False
    readers = [made.model.stream(ASKED) for _ in range(2)]
    first = [asyncio.create_task(anext(reader)) for reader in readers]
    await until(lambda: house.workers and len(house.workers[0].sent) == 2)
    (worker,) = house.workers
    for number in (1, 2):
        worker.inboxes[number].put_nowait(progress(number, "one", 1))
    assert [(await asked).text for asked in first] == ["one", "one"]
    for number in (1, 2):
        for text, tokens in (("two", 2), ("three", 3)):
            worker.inboxes[number].put_nowait(progress(number, text, tokens))
        worker.inboxes.pop(number).put_nowait(progress(number, "four", 4, "stop"))
    # The worker has capacity for two, and neither of these has been read to its end.
    status = made.model.status()
    assert (status.requests, status.running, worker.calls) == (0, 0, {})
    house.answers = True
    assert (await complete(made.model, ASKED)).text == "from 1"
    for reader in readers:
        rest = [delta async for delta in reader]
        assert [(delta.text, delta.completion_tokens) for delta in rest] == [("twothreefour", 4)]
        assert rest[0].finish_reason == "stop"
    assert made.model.status().requests == 0


async def test_the_prompt_and_its_log_probabilities_come_with_the_first_delta(made: Made) -> None:
    house.answers = False
    one, two = TokenLogprob(1, b"a", None), TokenLogprob(2, b"b", -0.5)
    reading = asyncio.create_task(all_deltas(made.model))
    await until(lambda: house.workers and house.workers[0].sent)
    inbox = house.workers[0].inboxes.pop(1)
    inbox.put_nowait(PromptText(id=1, at=0.0, text="ab"))
    for token in (one, two):
        inbox.put_nowait(PromptLogprobs(id=1, at=0.0, tokens=(token,)))
    inbox.put_nowait(msgspec.structs.replace(progress(1, "a", 1), logprobs=(two,)))
    await until(lambda: not inbox._answers)
    inbox.put_nowait(msgspec.structs.replace(progress(1, "b", 2, "stop"), logprobs=(one,)))
    first, second = await reading
    assert (first.text, first.logprobs) == ("a", (two,))
    assert (first.prompt_text, first.prompt_logprobs) == ("ab", (one, two))
    assert (second.text, second.logprobs) == ("b", (one,))
    assert (second.prompt_text, second.prompt_logprobs) == ("", ())


async def all_deltas(model: LocalModel) -> list[Delta]:
    return [delta async for delta in model.stream(ASKED)]


async def test_a_deadline_cancels_no_consumer_that_is_slow(made: Made) -> None:
    house.answers = False
    deadline = Deadline.after(0.05)
    stream = made.model.stream(ASKED, deadline)
    asking = asyncio.create_task(anext(stream))
    await until(lambda: house.workers and house.workers[0].sent)
    house.workers[0].inboxes[1].put_nowait(progress(1, "one", 1))
    await asking
    # The consumer is busy with this text until the deadline has passed.
    await until(lambda: deadline.remaining() < 0)
    with pytest.raises(DeadlineExceeded):
        await anext(stream)


@pytest.mark.parametrize("allow_partial", [False, True])
async def test_a_text_that_was_finished_in_time_is_whole_for_a_slow_reader(
    made: Made, allow_partial: bool
) -> None:
    house.answers = False
    deadline = Deadline.after(0.05)
    stream = made.model.stream(ASKED, deadline, allow_partial=allow_partial)
    asking = asyncio.create_task(anext(stream))
    await until(lambda: house.workers and house.workers[0].sent)
    inbox = house.workers[0].inboxes.pop(1)
    inbox.put_nowait(progress(1, "one", 1))
    await asking
    inbox.put_nowait(progress(1, "two", 2, "stop"))
    await until(lambda: deadline.remaining() < 0)
    rest = [delta async for delta in stream]
    assert [(delta.text, delta.finish_reason) for delta in rest] == [("two", "stop")]


async def test_a_slow_reader_gets_the_text_up_to_its_deadline_and_no_more(made: Made) -> None:
    house.answers = False
    deadline = Deadline.after(0.05)
    stream = made.model.stream(ASKED, deadline, allow_partial=True)
    asking = asyncio.create_task(anext(stream))
    await until(lambda: house.workers and house.workers[0].sent)
    inbox = house.workers[0].inboxes[1]
    inbox.put_nowait(progress(1, "one", 1))
    await asking
    inbox.put_nowait(progress(1, "two", 2))
    await until(lambda: deadline.remaining() < 0)
    assert (await anext(stream)).text == "two"
    inbox.put_nowait(progress(1, "three", 3))
    rest = [delta async for delta in stream]
    assert [(delta.text, delta.finish_reason) for delta in rest] == [("", "deadline")]


async def test_a_partial_stream_ends_with_its_deadline_as_the_reason(made: Made) -> None:
    house.answers = False
    stream = made.model.stream(ASKED, Deadline.after(0.05), allow_partial=True)
    asking = asyncio.create_task(anext(stream))
    await until(lambda: house.workers and house.workers[0].sent)
    house.workers[0].inboxes[1].put_nowait(progress(1, "one", 1))
    deltas = [await asking, *[delta async for delta in stream]]
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [
        ("one", None),
        ("", "deadline"),
    ]
    assert [delta.completion_tokens for delta in deltas] == [1, 1]


# Closing


async def test_closing_ends_the_worker_and_refuses_requests() -> None:
    made = Made()
    await complete(made.model, ASKED)
    await made.model.close()
    assert not house.workers[0].alive
    with pytest.raises(ModelUnavailable, match="shutting down") as caught:
        await complete(made.model, ASKED)
    assert caught.value.retry_after == 5
    assert made.deaths == []
    assert len(house.workers) == 1


async def test_closing_fails_requests_that_wait_for_a_load() -> None:
    made = Made()
    house.loading.clear()
    asking = asyncio.create_task(complete(made.model, ASKED))
    await until(lambda: house.workers)
    await made.model.close()
    with pytest.raises(ModelUnavailable, match="shutting down"):
        await asking
    assert not house.workers[0].alive


# Adapters


async def test_a_second_worker_loads_the_adapter_and_the_first_one_ends(made: Made) -> None:
    await complete(made.model, ASKED)
    await made.model.use_adapter(ADAPTER)
    assert house.workers[1].loaded is not None
    assert house.workers[1].loaded.adapter == "/adapters/20260102"
    assert made.model.status().adapter == ADAPTER
    assert (await complete(made.model, ASKED)).text == "from 2"
    await until(lambda: not house.workers[0].alive)
    # Only the swap ended it.
    assert (made.deaths, made.model.status().restarts) == ([], 0)


async def test_scores_have_the_adapter_that_gave_them(made: Made) -> None:
    await complete(made.model, ASKED)
    house.answers = False
    scoring = asyncio.create_task(made.model.score_choices(ASKED.messages, ("0", "1")))
    await until(lambda: house.workers[0].inboxes)
    swapping = asyncio.create_task(made.model.use_adapter(ADAPTER))
    await until(lambda: made.model.status().adapter == ADAPTER)
    assert (await scored(house.workers[0], scoring)).adapter is None
    await swapping
    scoring = asyncio.create_task(made.model.score_choices(ASKED.messages, ("0", "1")))
    await until(lambda: house.workers[1].inboxes)
    assert (await scored(house.workers[1], scoring)).adapter == "20260102"


async def scored(worker: FakeWorker, scoring: asyncio.Task[ChoiceScores]) -> ChoiceScores:
    """Answers the only job of a worker with scores."""
    ((number, inbox),) = worker.inboxes.items()
    worker.inboxes.clear()
    found = ChoiceScores({"0": 0.5, "1": 0.25})
    inbox.put_nowait(Scores(id=number, at=0.0, scores=[found]))
    return await scoring


async def test_an_adapter_that_does_not_load_is_refused_and_requests_continue(made: Made) -> None:
    await complete(made.model, ASKED)
    house.failures = [ModelUnavailable("it is for another model")]
    with pytest.raises(AdapterRejected) as caught:
        await made.model.use_adapter(ADAPTER)
    assert caught.value.detail == "The adapter 20260102 is refused: it is for another model"
    assert made.model.status().adapter is None
    assert (await complete(made.model, ASKED)).text == "from 1"
    assert [worker.alive for worker in house.workers] == [True, False]


async def test_a_swap_that_is_cancelled_changes_nothing(made: Made) -> None:
    await complete(made.model, ASKED)
    house.loading.clear()
    swapping = asyncio.create_task(made.model.use_adapter(ADAPTER))
    await until(lambda: len(house.workers) == 2)
    swapping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await swapping
    assert swapping.cancelled()
    await until(lambda: not house.workers[1].alive)
    assert made.model.status().adapter is None
    assert (await complete(made.model, ASKED)).text == "from 1"
