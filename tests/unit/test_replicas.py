"""Several workers of one model: how they load, share requests, fail over and change the adapter.

Tested through a `LocalModel` over fake worker processes, each with capacity for two requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm_sidecar.errors import AdapterRejected, ModelUnavailable
from llm_sidecar.models.base import Adapter, ChoiceScores, Delta, GenerationRequest, ReplicaStatus
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.local.protocol import Begun, Check, Generate, Prefill, Scores
from llm_sidecar.telemetry.calls import ModelCall, Observers
from tests.completions import complete
from tests.unit.fake_workers import ASKED, FakeWorker, house, progress, use_fake_workers

ADAPTER = Adapter(Path("/adapters/20260102"))
SAMPLED = replace(ASKED, temperature=0.7)
SEEDED = replace(ASKED, temperature=0.7, seed=7)


class Calls(Observers):
    """The calls that have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[ModelCall] = []

    def call_finished(self, call: ModelCall) -> None:
        self.ended.append(call)


calls: Calls


@pytest.fixture(autouse=True)
async def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    global calls
    calls = Calls()
    use_fake_workers(monkeypatch)


def model_of(replicas: int, *, preload: bool = False) -> LocalModel:
    return LocalModel(
        "phi3",
        lambda: ModelFiles("phi3/fake", Path("/models/phi3"), ()),
        replicas=replicas,
        preload=preload,
        observer=calls,
    )


@pytest.fixture
async def model() -> AsyncIterator[LocalModel]:
    """Two replicas; both are loaded and idle."""
    made = model_of(2, preload=True)
    await made.start()
    await until(lambda: states(made) == ["ready", "ready"])
    yield made
    await made.close()


def states(model: LocalModel) -> list[str]:
    return [replica.state for replica in model.status().replicas]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def settle() -> None:
    """Gives every task the chance to do what it can."""
    for _ in range(50):
        await asyncio.sleep(0)


def say(worker: FakeWorker, number: int, text: str, tokens: int = 1, *, last: bool = False) -> None:
    """Begins a request and generates text."""
    inbox = worker.inboxes[number]
    inbox.put_nowait(Begun(id=number, at=1.0))
    inbox.put_nowait(progress(number, text, tokens, "stop" if last else None))


async def begin(
    model: LocalModel, request: GenerationRequest = ASKED
) -> tuple[asyncio.Task[list[Delta]], list[Delta]]:
    """A request that the first worker begins with the text `one`; its deltas so far."""
    house.answers = False
    deltas: list[Delta] = []

    async def read() -> list[Delta]:
        async for delta in model.stream(request):
            deltas.append(delta)
        return deltas

    asking = asyncio.create_task(read())
    await until(lambda: house.workers[0].inboxes)
    say(house.workers[0], 1, "one", 1)
    await until(lambda: deltas)
    return asking, deltas


async def begun(worker: FakeWorker) -> None:
    """Begins the first request of a worker."""
    await until(lambda: worker.inboxes)
    worker.inboxes[1].put_nowait(Begun(id=1, at=1.0))
    await settle()


# Loading


async def test_replicas_load_one_after_the_other() -> None:
    model = model_of(3, preload=True)
    house.loading.clear()
    await model.start()
    await settle()
    assert (len(house.workers), states(model)) == (1, ["loading", "unloaded", "unloaded"])
    assert model.status().not_ready == "The phi3 model is loading."
    first, house.loading = house.loading, asyncio.Event()
    first.set()
    await until(lambda: len(house.workers) == 2)
    await settle()
    assert states(model) == ["ready", "loading", "unloaded"]
    assert (model.status().state, model.status().not_ready) == ("ready", None)
    house.loading.set()
    await until(lambda: states(model) == ["ready"] * 3)
    await model.close()


async def test_the_first_request_loads_all_replicas_and_waits_for_the_first() -> None:
    model = model_of(2)
    assert (await complete(model, ASKED)).text == "from 1"
    await until(lambda: states(model) == ["ready", "ready"])
    await model.close()


async def test_a_replica_that_does_not_load_keeps_no_other_from_loading() -> None:
    model = model_of(2)
    house.failures = [ModelUnavailable("it is damaged")]
    assert (await complete(model, ASKED)).text == "from 2"
    await until(lambda: states(model) == ["ready", "ready"])
    assert model.status().restarts == 1
    await model.close()


async def test_a_model_of_which_no_replica_loads_says_why() -> None:
    model = model_of(2)
    house.failures = [ModelUnavailable("it is damaged")] * 1000
    with pytest.raises(ModelUnavailable, match="it is damaged"):
        await complete(model, ASKED)
    await model.close()


async def test_closing_ends_a_load_and_begins_no_other() -> None:
    model = model_of(3, preload=True)
    house.loading.clear()
    await model.start()
    await until(lambda: house.workers)
    await model.close()
    await settle()
    assert [worker.alive for worker in house.workers] == [False]


async def test_each_replica_is_sent_a_new_prefix(model: LocalModel) -> None:
    house.answers = False
    prefilling = asyncio.create_task(model.prefill(ASKED))
    await until(lambda: all(worker.inboxes for worker in house.workers))
    assert [worker.sent for worker in house.workers] == [[Prefill(request=ASKED)]] * 2
    for worker in house.workers:
        worker.answer(1)
    await prefilling


# Requests


async def test_requests_go_to_the_least_busy_replica_up_to_the_capacity_of_all(
    model: LocalModel,
) -> None:
    house.answers = False
    first, second = house.workers
    asking = [asyncio.create_task(complete(model, ASKED)) for _ in range(5)]
    # The fifth one is checked while it waits.
    await until(lambda: Check(request=ASKED) in first.sent)
    first.answer(len(first.sent))
    await settle()
    assert [len(worker.calls) for worker in house.workers] == [2, 2]
    assert (model.status().requests, model.status().running) == (5, 4)
    second.answer(next(iter(second.inboxes)))
    # It is known only now where the fifth one goes.
    await until(lambda: [len(worker.calls) for worker in house.workers] == [2, 2])
    assert [sum(isinstance(job, Generate) for job in one.sent) for one in (first, second)] == [2, 3]
    for worker in house.workers:
        for number in tuple(worker.inboxes):
            worker.answer(number)
    texts = [completion.text for completion in await asyncio.gather(*asking)]
    assert sorted(texts) == ["from 1"] * 2 + ["from 2"] * 3
    # The fake workers answer the checks of both with tokens, too.
    assert model.status().completion_tokens_total == 14


async def test_a_replica_that_hangs_does_not_keep_a_request_from_the_other(
    model: LocalModel,
) -> None:
    house.answers = False
    hung, other = house.workers
    asking = [asyncio.create_task(complete(model, ASKED)) for _ in range(5)]
    await until(lambda: Check(request=ASKED) in other.sent)
    for _ in range(2):
        for number in tuple(other.inboxes):
            other.answer(number)
        await settle()
    assert [task.done() for task in asking].count(True) == 3
    hung.die("signal SIGKILL")
    for task in asking:
        task.cancel()
    await settle()


async def test_a_replica_counts_as_busy_until_it_has_ended_a_cancelled_request(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "cancel", lambda *_: None)
    house.answers = False
    hung, _ = house.workers
    asking = asyncio.create_task(complete(model, ASKED))
    await until(lambda: hung.inboxes)
    asking.cancel()
    await asyncio.wait([asking])
    house.answers = True
    assert [(await complete(model, ASKED)).text for _ in range(3)] == ["from 2"] * 3
    hung.answer(1)
    assert (await complete(model, ASKED)).text == "from 1"


# Failover


@pytest.mark.parametrize("request_", [ASKED, SEEDED])
async def test_another_replica_continues_the_text_of_one_that_dies(
    model: LocalModel, request_: GenerationRequest
) -> None:
    asking, deltas = await begin(model, request_)
    house.workers[0].die("signal SIGKILL")
    await until(lambda: house.workers[1].inboxes)
    assert house.workers[1].sent == [Generate(request=request_)]
    say(house.workers[1], 1, "on", 1)
    house.workers[1].inboxes[1].put_nowait(progress(1, "e two", 3))
    house.workers[1].inboxes.pop(1).put_nowait(progress(1, " three", 5, "stop"))
    await asking
    assert [(one.text, one.completion_tokens) for one in deltas][:1] == [("one", 1)]
    assert "".join(delta.text for delta in deltas) == "one two three"
    assert (deltas[-1].completion_tokens, deltas[-1].finish_reason) == (5, "stop")
    # It is one call, whose first token is that of the first worker.
    (call,) = calls.ended
    assert (call.error, call.completion_tokens, call.begun) == (None, 5, 1.0)


async def test_a_request_that_has_no_text_yet_is_repeated_whatever_it_is(model: LocalModel) -> None:
    house.answers = False
    asking = asyncio.create_task(complete(model, replace(SAMPLED, logprobs=1)))
    await begun(house.workers[0])
    house.workers[0].die("signal SIGKILL")
    await until(lambda: house.workers[1].inboxes)
    house.workers[1].answer(1)
    assert (await asking).text == "from 2"


async def test_scores_are_repeated(model: LocalModel) -> None:
    house.answers = False
    scoring = asyncio.create_task(model.score_choices(ASKED.messages, ("0", "1")))
    await begun(house.workers[0])
    house.workers[0].die("signal SIGKILL")
    await until(lambda: house.workers[1].inboxes)
    found = ChoiceScores({"0": 0.5, "1": 0.25})
    house.workers[1].inboxes.pop(1).put_nowait(Scores(id=1, at=0.0, scores=[found]))
    assert await scoring == found


async def test_text_that_cannot_be_repeated_fails_with_its_worker(model: LocalModel) -> None:
    asking, deltas = await begin(model, SAMPLED)
    house.workers[0].die("signal SIGKILL")
    with pytest.raises(ModelUnavailable) as caught:
        await asking
    assert caught.value.detail == (
        "The phi3 worker ended while it answered (signal SIGKILL); try again."
    )
    assert caught.value.retry_after == 1
    assert [delta.text for delta in deltas] == ["one"]
    assert house.workers[1].sent == []


async def test_text_that_continues_differently_is_an_error_and_is_cancelled(
    model: LocalModel,
) -> None:
    asking, deltas = await begin(model)
    house.workers[0].die("signal SIGKILL")
    await until(lambda: house.workers[1].inboxes)
    say(house.workers[1], 1, "two")
    with pytest.raises(ModelUnavailable, match="would continue differently"):
        await asking
    assert [delta.text for delta in deltas] == ["one"]
    assert house.workers[1].inboxes == {}
    assert (model.status().requests, model.status().running) == (0, 0)


async def test_a_request_that_kills_two_workers_gets_no_third() -> None:
    model = model_of(3, preload=True)
    await model.start()
    await until(lambda: states(model) == ["ready"] * 3)
    house.answers = False
    asking = asyncio.create_task(complete(model, ASKED))
    for worker in house.workers[:2]:
        await begun(worker)
        worker.die("signal SIGSEGV")
    with pytest.raises(ModelUnavailable, match="ended while it answered"):
        await asking
    assert house.workers[2].sent == []
    await model.close()


async def test_requests_wait_while_all_replicas_are_restarted(model: LocalModel) -> None:
    house.loading.clear()
    for worker in tuple(house.workers):
        worker.die("signal SIGKILL")
    await until(lambda: states(model) == ["loading", "loading"])
    assert model.status().not_ready == "The phi3 worker ended (signal SIGKILL)"
    asking = asyncio.create_task(complete(model, ASKED))
    await settle()
    house.loading.set()
    assert (await asking).text in ("from 3", "from 4")


async def test_a_replica_that_dies_is_restarted_and_shown(model: LocalModel) -> None:
    house.loading.clear()
    house.workers[0].die("signal SIGKILL")
    await until(lambda: states(model) == ["loading", "ready"])
    status = model.status()
    assert (status.state, status.not_ready, status.restarts, status.pid) == ("ready", None, 1, 2)
    reason = "The phi3 worker ended (signal SIGKILL)"
    assert status.replicas == (
        ReplicaStatus("loading", reason, None, None, 1),
        ReplicaStatus("ready", None, None, 2, 0),
    )
    house.loading.set()
    await until(lambda: states(model) == ["ready", "ready"])
    assert model.status().pid == 3


# Adapters


async def test_replicas_change_the_adapter_one_after_the_other(model: LocalModel) -> None:
    house.loading.clear()
    swapping = asyncio.create_task(model.use_adapter(ADAPTER))
    await settle()
    assert len(house.workers) == 3
    house.loading.set()
    await swapping
    assert [worker.adapter for worker in house.workers] == [None, None, "20260102", "20260102"]
    await until(lambda: [one.alive for one in house.workers] == [False, False, True, True])
    assert [one.adapter for one in model.status().replicas] == ["20260102"] * 2
    assert model.status().adapter == ADAPTER


async def test_a_replica_that_refuses_the_adapter_leaves_all_on_the_former(
    model: LocalModel,
) -> None:
    house.failures = [None, ModelUnavailable("there is no memory")]
    with pytest.raises(AdapterRejected) as caught:
        await model.use_adapter(ADAPTER)
    assert caught.value.detail == "The adapter 20260102 is refused: there is no memory"
    # The first one serves nothing until it has loaded the former adapter again.
    house.loading.clear()
    assert [(one.state, one.adapter) for one in model.status().replicas] == [
        ("loading", None),
        ("ready", None),
    ]
    assert [(await complete(model, ASKED)).text for _ in range(3)] == ["from 2"] * 3
    house.loading.set()
    await until(lambda: states(model) == ["ready", "ready"])
    alive = [worker for worker in house.workers if worker.alive]
    assert [worker.adapter for worker in alive] == [None, None]
    assert model.status().adapter is None


async def test_an_adapter_that_the_first_replica_refuses_changes_nothing(
    model: LocalModel,
) -> None:
    house.failures = [ModelUnavailable("it is for another model")]
    with pytest.raises(AdapterRejected):
        await model.use_adapter(ADAPTER)
    assert [worker.alive for worker in house.workers] == [True, True, False]
    assert states(model) == ["ready", "ready"]


async def test_a_swap_that_is_cancelled_goes_back(model: LocalModel) -> None:
    reached = asyncio.Event()
    loading = house.loading

    class SecondLoad(asyncio.Event):
        async def wait(self) -> bool:  # type: ignore[override]
            if len(house.workers) == 4:
                reached.set()
                await loading.wait()
            return True

    house.loading = SecondLoad()
    loading.clear()
    swapping = asyncio.create_task(model.use_adapter(ADAPTER))
    await reached.wait()
    swapping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await swapping
    assert swapping.cancelled()
    house.loading = loading
    loading.set()
    await until(lambda: states(model) == ["ready", "ready"])
    assert [one.adapter for one in model.status().replicas] == [None, None]


async def test_a_swap_that_is_cancelled_as_a_replica_has_changed_goes_back(
    model: LocalModel,
) -> None:
    swapping: asyncio.Task[None]

    # The first replica has just changed, and its caller does not know that yet.
    def cancel() -> None:
        asyncio.get_running_loop().call_soon(swapping.cancel)

    model._on_ready = cancel
    swapping = asyncio.create_task(model.use_adapter(ADAPTER))
    with pytest.raises(asyncio.CancelledError):
        await swapping
    model._on_ready = lambda: None
    await until(lambda: states(model) == ["ready", "ready"])
    alive = [worker for worker in house.workers if worker.alive]
    assert [worker.adapter for worker in alive] == [None, None]
    assert [one.adapter for one in model.status().replicas] == [None, None]


async def test_no_text_is_continued_with_another_adapter(model: LocalModel) -> None:
    asking, _ = await begin(model)
    # The fake worker ends with its running request when it is replaced.
    await model.use_adapter(ADAPTER)
    with pytest.raises(ModelUnavailable, match="ended while it answered"):
        await asking
    assert not any(isinstance(job, Generate) for one in house.workers[2:] for job in one.sent)


async def test_text_is_continued_by_the_replica_that_still_has_the_adapter(
    model: LocalModel,
) -> None:
    asking, deltas = await begin(model)
    house.failures = [None]
    gate, house.loading = house.loading, asyncio.Event()
    swapping = asyncio.create_task(model.use_adapter(ADAPTER))
    await until(lambda: len(house.workers) == 3)
    house.loading.set()
    house.loading = gate
    gate.clear()
    # The first one has changed, and the second one has not.
    await until(lambda: house.workers[1].inboxes)
    say(house.workers[1], 1, "one two", 2, last=True)
    del house.workers[1].inboxes[1]
    await asking
    assert [(delta.text, delta.adapter) for delta in deltas] == [("one", None), (" two", None)]
    gate.set()
    await swapping
