"""What a model reports to its observer about each call, with a real worker and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import EngineOptions, GenerationRequest
from llm_sidecar.errors import InvalidRequest, ModelUnavailable, QueueFull
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.telemetry.calls import (
    CANCELLED,
    UNEXPECTED,
    ModelCall,
    Observers,
    error_name,
    observed,
)
from tests.completions import complete

SHORT = GenerationRequest(hermes_plugin.chat_messages("Long ABC"), 20)
LONG = GenerationRequest(hermes_plugin.chat_messages("Long ABC"), 7000)


class Recorder:
    """Keeps the calls it observes."""

    def __init__(self) -> None:
        self.started: list[ModelCall] = []
        self.finished: list[ModelCall] = []

    def call_started(self, call: ModelCall) -> None:
        assert call.finished is None
        self.started.append(call)

    def call_finished(self, call: ModelCall) -> None:
        assert call.finished is not None
        self.finished.append(call)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def model(random_phi3_onnx: Path, recorder: Recorder) -> AsyncIterator[LocalModel]:
    made = LocalModel(
        "hermes",
        lambda: ModelFiles("hermes/random", random_phi3_onnx),
        options=EngineOptions("cpu"),
        limits=ModelLimits(load_wait=60.0, queue_length=2),
        observer=recorder,
    )
    yield made
    await made.close()


async def test_a_generation_is_observed_with_its_times_in_order_and_its_tokens(
    model: LocalModel, recorder: Recorder
) -> None:
    completion = await complete(model, SHORT)
    (call,) = recorder.finished
    assert recorder.started == [call]
    assert (call.model, call.operation, call.served_by) == ("hermes", "generate", "hermes/random")
    assert call.begun is not None
    assert call.first_token is not None
    assert call.finished is not None
    assert call.queued < call.begun <= call.first_token <= call.finished
    assert call.prompt_tokens == completion.prompt_tokens
    assert call.completion_tokens == completion.completion_tokens == 20
    assert 0 <= sum(tokens for _, tokens in call.steps) < 20
    assert sum(seconds for seconds, _ in call.steps) <= call.finished - call.first_token
    assert (call.finish_reason, call.error, call.adapter) == ("length", None, None)


async def test_scores_are_a_call_without_tokens(model: LocalModel, recorder: Recorder) -> None:
    messages = hermes_plugin.score_messages({"ticker": "ABC"})
    await model.score_choices(messages, hermes_plugin.SCORE_ANSWERS)
    (call,) = recorder.finished
    assert call.operation == "score_choices"
    assert call.begun is not None
    assert (call.first_token, call.finish_reason, call.error) == (None, None, None)


async def test_each_refused_failed_and_abandoned_call_has_its_error(
    model: LocalModel, recorder: Recorder
) -> None:
    too_long = GenerationRequest(proposals.build_messages("ABC " * 9000), 20)
    with pytest.raises(InvalidRequest):
        await complete(model, too_long)
    running = [asyncio.create_task(complete(model, LONG)) for _ in range(2)]
    async with asyncio.timeout(30):
        while not model.status().running:
            await asyncio.sleep(0.005)
    assert model.status().requests == 2
    with pytest.raises(QueueFull):
        await complete(model, SHORT)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    assert model.status().running == 0
    errors = [call.error for call in recorder.finished]
    assert errors == ["InvalidRequest", "QueueFull", CANCELLED, CANCELLED]
    assert len(recorder.started) == 4


def test_several_observers_all_observe_a_call() -> None:
    first, second = Recorder(), Recorder()
    with observed(Observers(first, second), ModelCall("phi3", "generate")) as call:
        pass
    assert first.finished == second.finished == [call]
    assert call.error is None


def test_an_error_is_counted_under_a_bounded_name() -> None:
    class Odd(ModelUnavailable):
        """A subclass that another module defines."""

    assert error_name(ModelUnavailable("x")) == "ModelUnavailable"
    assert error_name(Odd("x")) == "ModelUnavailable"
    assert error_name(asyncio.CancelledError()) == CANCELLED
    assert error_name(GeneratorExit()) == CANCELLED
    assert error_name(KeyError("a prompt")) == UNEXPECTED
