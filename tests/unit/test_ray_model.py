"""A model in replicas of other processes: requests, losses, adapters and states.

The replicas are in this process, but only bytes pass between them and the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import (
    AdapterRejected,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
    SidecarError,
)
from llm_sidecar.models.base import (
    Adapter,
    ChoiceScores,
    Completion,
    Delta,
    GenerationRequest,
    ModelStatus,
    Question,
    RefusedRequest,
    Speed,
    TokenLogprob,
)
from llm_sidecar.models.failover import ReplicaLost
from llm_sidecar.models.fake import IDENTITY, FakeModel
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.ray.fleet import Replicas
from llm_sidecar.models.ray.model import RayModel
from llm_sidecar.models.ray.replica import ModelReplica
from llm_sidecar.models.ray.wire import (
    Begun,
    Generated,
    Refused,
    encode,
    error_of,
    refused,
)
from llm_sidecar.telemetry.calls import ModelCall

GREEDY = GenerationRequest([{"role": "user", "content": "What now?"}], 5)
LOST = ReplicaLost("A replica ended while it answered; try again.", retry_after=1)
DATED = Path("/here")


def deltas(*texts: str, adapter: str | None = None) -> list[Delta]:
    """One delta for each text, of which the last one ends the generation."""
    made = [
        Delta(text, "phi3/fake", adapter, 7, number, 1, identity=IDENTITY)
        for number, text in enumerate(texts, 1)
    ]
    return [*made[:-1], replace(made[-1], finish_reason="stop")]


def find(name: str | None) -> Adapter | None:
    """The adapters of each replica are in a folder of its own."""
    if name == "20260301":
        raise AdapterRejected("The adapter 20260301 is not here.")
    return None if name is None else Adapter(Path("/there") / name)


class FakeReplicas(Replicas):
    """Replicas in this process.

    Attributes:
        models: the model of each replica; requests go to them in turn.
        lost: for each of the next calls, the number of messages after which its replica dies.
        orders: the orders so far.
    """

    def __init__(self, *models: FakeModel) -> None:
        self.models = dict(zip("abc", models, strict=False))
        self.lost: list[int] = []
        self.orders: list[bytes] = []
        self._calls = 0

    async def answer(self, call: bytes) -> AsyncGenerator[bytes, None]:
        name = sorted(self.models)[self._calls % len(self.models)]
        self._calls += 1
        left = self.lost.pop(0) if self.lost else 1000
        answers = ModelReplica(name, self.models[name], find).answer(call)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                if not left:
                    raise LOST
                left -= 1
                yield answer

    async def obey(self, order: bytes, seconds: float) -> list[bytes]:
        self.orders.append(order)
        return [
            await ModelReplica(name, model, find).obey(order) for name, model in self.models.items()
        ]


class Script(Replicas):
    """A replica that sends given messages, and then raises an error, or waits for ever."""

    def __init__(self, *messages: Any, error: Exception | None = None) -> None:
        self._messages = messages
        self._error = error
        self.closed = asyncio.Event()

    async def answer(self, call: bytes) -> AsyncGenerator[bytes, None]:
        try:
            for message in self._messages:
                yield encode(message)
            if self._error is not None:
                raise self._error
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def obey(self, order: bytes, seconds: float) -> list[bytes]:
        raise TimeoutError


class Recorder:
    """Records the calls."""

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []

    def call_started(self, call: ModelCall) -> None:
        self.calls.append(call)

    def call_finished(self, call: ModelCall) -> None:
        assert call.finished is not None


async def generate(
    model: RayModel, request: GenerationRequest = GREEDY, **options: Any
) -> list[Delta]:
    return [delta async for delta in model.stream(request, **options)]


async def texts(model: RayModel, request: GenerationRequest = GREEDY) -> list[str]:
    return [delta.text for delta in await generate(model, request)]


async def test_a_generation_arrives_as_the_model_in_the_replica_gives_it() -> None:
    made = deltas("Hold", " it", adapter="20260101")
    token = TokenLogprob(3, b"\xff", -0.5, (TokenLogprob(4, b"x", -1.5),))
    made[0] = replace(made[0], logprobs=(token,), prompt_logprobs=(token,), prompt_text="What")
    request = replace(GREEDY, guidance="{}", seed=7, tokens=[1, 2], top_p=0.5, logprobs=1)
    fake, recorder = FakeModel(made), Recorder()
    model = RayModel("phi3", FakeReplicas(fake), observer=recorder)
    assert await generate(model, request) == made
    assert fake.requests == [request]
    (call,) = recorder.calls
    assert (call.served_by, call.adapter, call.identity) == ("phi3/fake", "20260101", IDENTITY)
    assert (call.prompt_tokens, call.completion_tokens, call.cached_tokens) == (7, 2, 1)
    assert (call.finish_reason, call.error) == ("stop", None)
    assert [name for name, _, _ in call.phases()] == ["queue", "prefill", "decode"]


async def test_scores_arrive_as_the_model_in_the_replica_gives_them() -> None:
    scores = ChoiceScores({"0": 0.25, "1": 0.5}, 9, 3, "20260101")
    fake, recorder = FakeModel(scores, scores), Recorder()
    model = RayModel("hermes", FakeReplicas(fake), observer=recorder)
    question = Question([{"role": "user", "content": "How good?"}], ["0", "1"])
    assert await model.score_questions([question]) == [scores]
    assert await model.score_choices(question.messages, question.choices) == scores
    assert fake.requests == [(question.messages, question.choices)] * 2
    assert [call.operation for call in recorder.calls] == ["score_choices"] * 2
    assert recorder.calls[0].adapter == "20260101"


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (InvalidRequest("it is too long", field="prompt", exceeds_context=True), InvalidRequest),
        (RefusedRequest("the server refuses it"), InvalidRequest),
        (QueueFull("The queue is full.", retry_after=3), QueueFull),
    ],
)
async def test_an_error_of_the_replica_is_the_error_of_the_call(
    raised: SidecarError, arrives: type[SidecarError]
) -> None:
    model = RayModel("phi3", FakeReplicas(FakeModel(raised)))
    with pytest.raises(arrives) as caught:
        await generate(model)
    assert type(caught.value) is arrives
    for name, value in vars(raised).items():
        assert getattr(caught.value, name) == value, name


async def test_an_unexpected_error_of_the_replica_is_unavailable_and_keeps_its_text() -> None:
    model = RayModel("phi3", FakeReplicas(FakeModel(ValueError("a prompt"))))
    with pytest.raises(ModelUnavailable) as caught:
        await generate(model)
    assert caught.value.detail == "The replica failed; see its log."


def test_an_error_of_a_newer_version_is_unavailable() -> None:
    error = error_of(Refused(kind="NewError", detail="It is new.", retry_after=2))
    assert (type(error), error.detail, error.retry_after) == (ModelUnavailable, "It is new.", 2)


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(Refused(kind="InvalidRequest", detail="\ud800"))
    assert caught.value.field == "prompt"


async def test_another_replica_answers_if_one_is_not_available() -> None:
    away = FakeModel(ModelUnavailable("It is loading.", retry_after=5))
    model = RayModel("phi3", FakeReplicas(away, FakeModel(deltas("Hold"))))
    assert await texts(model) == ["Hold"]


async def test_if_both_are_not_available_the_second_says_why() -> None:
    replicas = FakeReplicas(
        FakeModel(ModelUnavailable("one")), FakeModel(ModelUnavailable("two", retry_after=5))
    )
    with pytest.raises(ModelUnavailable) as caught:
        await generate(RayModel("phi3", replicas))
    assert (caught.value.detail, caught.value.retry_after) == ("two", 5)


@pytest.mark.parametrize("messages", [0, 1, 2, 3])
async def test_if_a_replica_dies_another_one_continues_without_repeating_text(
    messages: int,
) -> None:
    """It dies before it begins, then before its first, second and third text."""
    parts = deltas("a", "b", "c", "d")
    replicas = FakeReplicas(FakeModel(parts), FakeModel(parts))
    replicas.lost = [messages]
    assert "".join(await texts(RayModel("phi3", replicas))) == "abcd"


async def test_a_stream_that_ends_early_is_a_loss() -> None:
    both = [FakeModel(deltas("a", "b")[:1]) for _ in range(2)]
    with pytest.raises(ReplicaLost):
        await generate(RayModel("phi3", FakeReplicas(*both)))


async def test_text_of_another_adapter_does_not_continue() -> None:
    replicas = FakeReplicas(
        FakeModel(deltas("a", "b", adapter="20260101")),
        FakeModel(deltas("a", "b", adapter="20260102")),
    )
    replicas.lost = [2]
    with pytest.raises(ReplicaLost, match="another adapter"):
        await generate(RayModel("phi3", replicas))


async def test_sampled_text_without_a_seed_does_not_continue() -> None:
    replicas = FakeReplicas(FakeModel(deltas("a", "b")), FakeModel(deltas("a", "b")))
    replicas.lost = [2]
    with pytest.raises(ReplicaLost) as caught:
        await generate(RayModel("phi3", replicas), replace(GREEDY, temperature=0.5))
    assert caught.value.detail == LOST.detail


async def test_a_request_is_repeated_once() -> None:
    replicas = FakeReplicas(*(FakeModel(deltas("a")) for _ in range(3)))
    replicas.lost = [0, 0]
    with pytest.raises(ReplicaLost):
        await generate(RayModel("phi3", replicas))


async def test_scores_are_repeated() -> None:
    scores = ChoiceScores({"0": 1.0})
    replicas = FakeReplicas(FakeModel(scores), FakeModel(scores))
    replicas.lost = [1]
    assert await RayModel("hermes", replicas).score_choices([], ["0"]) == scores


async def test_the_replica_has_the_time_that_is_left() -> None:
    fake = FakeModel(deltas("a"))
    deadline = Deadline(time.monotonic() - 20, 60)
    await generate(RayModel("phi3", FakeReplicas(fake)), deadline=deadline)
    (call,) = fake.calls
    assert call.deadline is not None
    assert call.deadline.seconds == 60
    assert call.deadline.remaining() == pytest.approx(40, abs=5)


async def test_a_deadline_that_passes_before_an_answer_is_exceeded() -> None:
    script = Script()
    with pytest.raises(DeadlineExceeded, match=r"^phi3 did not answer within 60 s: ") as caught:
        await generate(RayModel("phi3", script), deadline=Deadline(time.monotonic() - 61, 60))
    assert caught.value.retry_after == 1


BEGUN = Begun(0.5, "phi3/fake", None, IDENTITY)
PASSED = Refused(kind="DeadlineExceeded", detail="late")


async def test_a_partial_text_ends_at_the_deadline_if_that_is_allowed() -> None:
    part = Generated(replace(deltas("a", "b")[0], identity=None))
    model = RayModel("phi3", Script(BEGUN, part, PASSED))
    found = await generate(model, allow_partial=True)
    assert [(delta.text, delta.finish_reason) for delta in found] == [("a", None), ("", "deadline")]


@pytest.mark.parametrize("allow_partial", [True, False])
async def test_without_text_there_is_no_partial_answer(allow_partial: bool) -> None:
    with pytest.raises(DeadlineExceeded):
        await generate(RayModel("phi3", Script(BEGUN, PASSED)), allow_partial=allow_partial)


async def test_closing_the_stream_closes_that_of_the_replica() -> None:
    part = Generated(deltas("a", "b")[0])
    script = Script(BEGUN, part)
    model = RayModel("phi3", script)
    stream = model.stream(GREEDY)
    assert (await anext(stream)).text == "a"
    assert (model.status().requests, model.status().running) == (1, 1)
    await stream.aclose()
    assert script.closed.is_set()
    assert (model.status().requests, model.status().running) == (0, 0)


async def test_a_full_queue_refuses() -> None:
    model = RayModel("phi3", Script(BEGUN), limits=ModelLimits(queue_length=1))
    waiting = asyncio.ensure_future(anext(model.stream(GREEDY)))
    while not model.status().requests:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull, match=r"^The phi3 queue is full"):
        await generate(model)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting


async def test_a_closed_model_refuses() -> None:
    model = RayModel("phi3", FakeReplicas(FakeModel(deltas("a"))))
    await model.close()
    with pytest.raises(ModelUnavailable, match=r"^The server is shutting down"):
        await generate(model)


def with_adapters(*names: str | None) -> FakeReplicas:
    models = [FakeModel() for _ in names]
    for model, name in zip(models, names, strict=True):
        model.state = ModelStatus(adapter=find(name))
    return FakeReplicas(*models)


def in_use(replicas: FakeReplicas) -> list[str | None]:
    adapters = [model.state.adapter for model in replicas.models.values()]
    return [None if adapter is None else adapter.name for adapter in adapters]


async def test_a_swap_changes_one_replica_after_the_other() -> None:
    replicas = with_adapters(None, None, "20260102")
    seen = list[list[str | None]]()
    obey = replicas.obey

    async def record(order: bytes, seconds: float) -> list[bytes]:
        seen.append(in_use(replicas))
        return await obey(order, seconds)

    replicas.obey = record  # type: ignore[method-assign]
    model = RayModel("phi3", replicas)
    await model.use_adapter(Adapter(DATED / "20260102"))
    # A look, a change, a change, a look.
    assert seen == [
        [None, None, "20260102"],
        [None, None, "20260102"],
        ["20260102", None, "20260102"],
        ["20260102"] * 3,
    ]
    assert model.status().adapter == Adapter(DATED / "20260102")
    # Each replica has a folder of its own.
    assert replicas.models["a"].state.adapter == Adapter(Path("/there/20260102"))


async def test_a_replica_that_starts_during_a_swap_is_changed_too() -> None:
    replicas = with_adapters(None)
    late = with_adapters(None).models["a"]
    obey = replicas.obey

    async def start_another(order: bytes, seconds: float) -> list[bytes]:
        replies = await obey(order, seconds)
        replicas.models["b"] = late
        return replies

    replicas.obey = start_another  # type: ignore[method-assign]
    await RayModel("phi3", replicas).use_adapter(Adapter(DATED / "20260102"))
    assert in_use(replicas) == ["20260102", "20260102"]


async def test_if_a_replica_refuses_the_adapter_those_that_changed_go_back() -> None:
    replicas = with_adapters("20260101", None, None)

    async def refuse(adapter: Adapter | None) -> None:
        raise AdapterRejected("The adapter does not fit.")

    replicas.models["b"].use_adapter = refuse  # type: ignore[method-assign]
    model = RayModel("phi3", replicas)
    with pytest.raises(AdapterRejected, match=r"^The adapter does not fit\.$"):
        await model.use_adapter(Adapter(DATED / "20260102"))
    assert in_use(replicas) == ["20260101", None, None]
    assert model.status().adapter is None


async def test_if_the_first_replica_ends_while_it_changes_the_swap_fails() -> None:
    replicas = with_adapters("20260101", None)
    obey = replicas.obey

    async def end(order: bytes, seconds: float) -> list[bytes]:
        if b"UseAdapter" in order:
            replicas.models.pop("a", None)
        return await obey(order, seconds)

    replicas.obey = end  # type: ignore[method-assign]
    with pytest.raises(ModelUnavailable, match=r"^A replica of phi3 ended while its adapter"):
        await RayModel("phi3", replicas).use_adapter(Adapter(DATED / "20260102"))
    assert in_use(replicas) == [None]


async def test_if_a_later_replica_ends_while_it_changes_the_swap_goes_on() -> None:
    replicas = with_adapters(None, None, None)
    obey = replicas.obey

    async def end(order: bytes, seconds: float) -> list[bytes]:
        if b"UseAdapter" in order and in_use(replicas)[0] == "20260102":
            replicas.models.pop("b", None)
        return await obey(order, seconds)

    replicas.obey = end  # type: ignore[method-assign]
    await RayModel("phi3", replicas).use_adapter(Adapter(DATED / "20260102"))
    assert in_use(replicas) == ["20260102", "20260102"]


async def test_an_adapter_that_a_machine_does_not_have_is_refused() -> None:
    with pytest.raises(AdapterRejected, match=r"^The adapter 20260301 is not here\.$"):
        await RayModel("phi3", with_adapters(None)).use_adapter(Adapter(DATED / "20260301"))


async def test_a_swap_without_an_answer_of_the_replicas_fails() -> None:
    with pytest.raises(ModelUnavailable, match=r"^Not every replica of phi3 has replied"):
        await RayModel("phi3", Script()).use_adapter(None)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Event]:
    """The pauses of the watch, each of which lasts until it is set."""
    made: list[asyncio.Event] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds == 0:
            await real_sleep(0)
            return
        made.append(asyncio.Event())
        await made[-1].wait()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return made


async def look_again(pauses: list[asyncio.Event]) -> None:
    """Waits for the end of the next look."""
    count = len(pauses)
    if pauses:
        pauses[-1].set()
    while len(pauses) == count:
        await asyncio.sleep(0)


async def test_the_state_is_that_of_the_replicas(pauses: list[asyncio.Event]) -> None:
    replicas = FakeReplicas(FakeModel(), FakeModel())
    speed = Speed(prefill=14.25, decode=3.9)
    ready = ModelStatus(model="phi3/fake", pid=7, completion_tokens_total=3, speed=speed)
    failed = ModelStatus("failed", "it ended", "it ended", pid=8, completion_tokens_total=2)
    replicas.models["a"].state, replicas.models["b"].state = failed, ready
    model = RayModel("phi3", replicas, limits=ModelLimits(queue_length=9))
    assert model.status().not_ready == "No replica of phi3 answers."
    await model.start(Adapter(DATED / "20260101"))
    await look_again(pauses)
    status = model.status()
    assert (status.state, status.not_ready, status.pid, status.speed) == ("ready", None, 7, speed)
    assert status.adapter == Adapter(DATED / "20260101")
    assert (status.completion_tokens_total, status.queue_length) == (5, 9)
    assert [(one.state, one.pid) for one in status.replicas] == [("failed", 8), ("ready", 7)]
    await model.close()


async def test_an_old_state_does_not_count(
    pauses: list[asyncio.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RayModel("phi3", FakeReplicas(FakeModel()))
    await model.start()
    await look_again(pauses)
    assert model.status().not_ready is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    assert model.status().state == "loading"
    assert model.status().not_ready == "No replica of phi3 answers."
    await model.close()


async def test_every_replica_prefills_and_new_ones_too(pauses: list[asyncio.Event]) -> None:
    replicas = FakeReplicas(FakeModel(), FakeModel())
    model = RayModel("phi3", replicas)
    await model.prefill(GREEDY)
    assert [one.prefixes for one in replicas.models.values()] == [[GREEDY], [GREEDY]]
    await model.start()
    await look_again(pauses)
    replicas.models["c"] = FakeModel()
    await look_again(pauses)
    await look_again(pauses)
    assert replicas.models["c"].prefixes == [GREEDY]
    await model.close()


async def test_a_new_replica_with_another_adapter_gets_the_one_in_use_after_a_while(
    pauses: list[asyncio.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = with_adapters("20260101")
    model = RayModel("phi3", replicas)
    await model.start(Adapter(DATED / "20260101"))
    await look_again(pauses)
    replicas.models["b"] = with_adapters(None).models["a"]
    await look_again(pauses)
    assert in_use(replicas) == ["20260101", None]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    for _ in range(3):
        await look_again(pauses)
    assert in_use(replicas) == ["20260101", "20260101"]
    await model.close()


async def test_an_old_replica_with_another_adapter_may_be_in_the_swap_of_another_sidecar(
    pauses: list[asyncio.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = with_adapters("20260101")
    model = RayModel("phi3", replicas)
    await model.start(Adapter(DATED / "20260101"))
    await look_again(pauses)
    replicas.models["a"].state = ModelStatus(adapter=find("20260102"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    for _ in range(3):
        await look_again(pauses)
    assert in_use(replicas) == ["20260102"]
    await model.close()


async def test_replicas_that_cannot_be_asked_are_asked_again(pauses: list[asyncio.Event]) -> None:
    model = RayModel("phi3", Script())
    await model.start()
    for _ in range(3):
        await look_again(pauses)
    assert model.status().state == "loading"
    await model.close()


def test_an_error_is_sent_as_its_nearest_known_kind() -> None:
    assert refused(RefusedRequest("no")).kind == "InvalidRequest"
    assert refused(LOST).kind == "ReplicaLost"


async def test_a_completion_is_whole() -> None:
    model = RayModel("phi3", FakeReplicas(FakeModel(deltas("a", "b"))))
    assert Completion.of(await generate(model)).text == "ab"
