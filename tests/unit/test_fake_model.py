"""The fake model behaves as a real one does, so that tests with it are valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import AdapterRejected, ModelUnavailable, QueueFull
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Completion,
    Delta,
    GenerationRequest,
    ModelStatus,
    TokenLogprob,
)
from llm_sidecar.models.fake import Call, FakeModel
from tests.unit.fakes import completion, text_of

REQUEST = GenerationRequest([{"role": "user", "content": "Hello."}], 8)


async def test_a_completion_streams_as_two_deltas_of_which_the_last_one_ends_it() -> None:
    answer = completion("Hold.", adapter="20260102", cached_tokens=3)
    deltas = [delta async for delta in FakeModel(answer).stream(REQUEST)]
    assert [delta.text for delta in deltas] == ["Ho", "ld."]
    assert [delta.finish_reason for delta in deltas] == [None, "stop"]
    assert Completion.of(deltas) == answer


async def test_log_probabilities_stream_once_each() -> None:
    one, two, three = (TokenLogprob(number, b"a", -0.5) for number in (1, 2, 3))
    answer = replace(completion("Hold."), logprobs=(one, two, three), prompt_logprobs=(two,))
    deltas = [delta async for delta in FakeModel(answer).stream(REQUEST)]
    assert [delta.logprobs for delta in deltas] == [(one,), (two, three)]
    assert [delta.prompt_logprobs for delta in deltas] == [(two,), ()]
    assert Completion.of(deltas) == answer


async def test_deltas_stream_as_they_are() -> None:
    deltas = [Delta("a", "m"), Delta("b", "m"), Delta("", "m", finish_reason="length")]
    assert [delta async for delta in FakeModel(deltas).stream(REQUEST)] == deltas


@pytest.mark.parametrize("deltas", [[], [Delta("a", "m")]])
def test_a_generation_without_its_end_is_no_completion(deltas: list[Delta]) -> None:
    message = r"^The model ended its answer before it was complete; try again\.$"
    with pytest.raises(ModelUnavailable, match=message):
        Completion.of(deltas)


async def test_it_keeps_what_it_was_asked() -> None:
    scores, deadline = ChoiceScores({"0": 0.25, "1": 0.5}), Deadline.after(60)
    model = FakeModel(completion("Hold."), scores, QueueFull("full"))
    await text_of(model.stream(REQUEST, deadline, allow_partial=True))
    assert await model.score_choices(REQUEST.messages, ("0", "1")) is scores
    with pytest.raises(QueueFull, match="full"):
        await text_of(model.stream(REQUEST))
    choices = (REQUEST.messages, ("0", "1"))
    assert model.calls == [Call(REQUEST, deadline, True), Call(choices), Call(REQUEST)]
    assert model.requests == [REQUEST, choices, REQUEST]
    assert (scores.mass, model.answers) == (0.75, [])


async def test_it_has_the_adapter_that_it_is_given() -> None:
    model, adapter = FakeModel(), Adapter(Path("/adapters/20260102"))
    await model.start(adapter)
    assert model.status() == ModelStatus(adapter=adapter)
    await model.use_adapter(None)
    assert model.status().adapter is None


class Smallest(ChatModel):
    """The minimum that a model class must define."""

    async def stream(self, request, deadline=None, *, allow_partial=False):  # type: ignore[no-untyped-def]
        yield Delta("", "smallest", finish_reason="stop")

    async def score_choices(self, messages, choices, deadline=None):  # type: ignore[no-untyped-def]
        return ChoiceScores({})

    def status(self) -> ModelStatus:
        return ModelStatus()


async def test_a_model_need_not_write_the_other_methods() -> None:
    model = Smallest()
    await model.start()
    await model.prefill(REQUEST)
    await model.use_adapter(None)
    with pytest.raises(AdapterRejected, match=r"^This model takes no adapters\.$"):
        await model.use_adapter(Adapter(Path("20260102")))
    model.drain()
    await model.close()
