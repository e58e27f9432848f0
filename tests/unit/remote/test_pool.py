"""Which of several servers gets a request, and when none does."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
)
from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.silence import silence_limit
from tests.completions import complete
from tests.unit.remote.openai_server import (
    GatedStream,
    OpenAIServer,
    Stream,
    chunk,
    events,
)
from tests.unit.remote.samples import (
    ASK,
    FINE,
    SCORE,
    Make,
    answer,
    no_rest,
    server_of,
)


async def test_the_server_with_the_fewest_requests_is_asked(make: Make) -> None:
    one, two = OpenAIServer(Stream(FINE), Stream(FINE)), OpenAIServer(Stream(FINE))
    model = make(one=one, two=two)
    async with aclosing(model.stream(ASK)) as first:
        await anext(first)
        await complete(model, ASK)
    assert [len(one.requests), len(two.requests)] == [1, 1]
    # Both are idle: take the one whose last request is older.
    await complete(model, ASK)
    assert [len(one.requests), len(two.requests)] == [2, 1]


@pytest.mark.parametrize(
    "failure",
    [answer(500), answer(429), answer(503), answer(404), Stream([])],
)
async def test_another_server_is_asked_before_the_first_token(make: Make, failure: Any) -> None:
    one, two = OpenAIServer(failure), OpenAIServer(Stream(FINE))
    assert (await complete(make(one=one, two=two), ASK)).text == "Fine."
    assert [len(one.requests), len(two.requests)] == [1, 1]


async def test_a_connection_that_the_server_has_closed_is_replaced(make: Make) -> None:
    server = OpenAIServer(httpx.ReadError("closed"), Stream(FINE))
    assert (await complete(make(a=server), ASK)).text == "Fine."
    assert len(server.requests) == 2


async def test_a_request_that_breaks_a_new_connection_is_not_sent_again(make: Make) -> None:
    server = OpenAIServer(httpx.ReadError("crashed"), Stream(FINE))
    server.is_connecting = True
    with pytest.raises(ModelUnavailable, match="broke off"):
        await complete(make(a=server), ASK)
    assert len(server.requests) == 1


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Shortens the time limit for silence of the server `one`; has the real limit of each request.

    The others keep theirs: on a busy machine, an answer may take longer than the short one.
    """
    limits: list[float | None] = []

    def shortened(connection: Connection, seconds: float | None) -> Any:
        limits.append(seconds)
        is_short = seconds is not None and connection.url == "http://one/v1"
        return silence_limit(connection, 0.01 if is_short else seconds)

    monkeypatch.setattr("llm_sidecar.models.remote.pool.silence_limit", shortened)
    return limits


async def test_half_of_the_time_is_left_for_another_server(
    make: Make, impatience: list[float | None]
) -> None:
    silent = GatedStream(FINE)
    one, two = OpenAIServer(silent), OpenAIServer(Stream(FINE))
    model = make(one=one, two=two)
    assert (await complete(model, ASK, Deadline.after(40))).text == "Fine."
    assert silent.closed
    first, last = impatience
    assert first == pytest.approx(20, abs=5)
    # The last one has the time that is left.
    assert last is None


async def test_the_last_server_has_all_the_time_that_is_left(
    make: Make, impatience: list[float | None]
) -> None:
    one, two = OpenAIServer(answer(500)), OpenAIServer(GatedStream(FINE))
    model = make(one=one, two=two)
    # The first contact may take longer than this deadline.
    await model.use_adapter(None)
    with pytest.raises(DeadlineExceeded):
        await complete(model, ASK, Deadline.after(0.1))
    assert impatience[1] is None


async def test_a_score_is_asked_of_another_server_as_well(
    make: Make, impatience: list[float | None]
) -> None:
    said = httpx.Response(200, json={"choices": [{"message": {"content": "7"}}]})
    one, two = OpenAIServer(GatedStream(FINE)), OpenAIServer(said)
    scores = await make(one=one, two=two).score_choices(SCORE, ("7", "8"))
    assert scores.probabilities["7"] > scores.probabilities["8"] == 0.0
    assert len(impatience) == 2


@pytest.mark.parametrize(("least_silence", "state"), [(10.0, "ready"), (0.0, "resting")])
async def test_silence_before_another_server_is_asked_is_a_failure(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    impatience: list[float | None],
    least_silence: float,
    state: str,
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.server._LEAST_SILENCE", least_silence)
    one = OpenAIServer(*(GatedStream(FINE) for _ in range(3)))
    two = OpenAIServer(*(Stream(FINE) for _ in range(6)))
    model = make(one=one, two=two)
    while one.answers:
        assert (await complete(model, ASK, Deadline.after(40))).text == "Fine."
    assert [server.state for server in model.status().servers] == [state, "ready"]


async def test_no_other_server_is_asked_after_the_first_token(make: Make) -> None:
    one, two = OpenAIServer(Stream(events(chunk("Fi"))[:1])), OpenAIServer()
    with pytest.raises(ModelUnavailable, match="ended its answer before"):
        await complete(make(one=one, two=two), ASK)
    assert two.requests == []


@pytest.mark.parametrize("body", [{"error": "too long"}, {"error": "unknown keyword"}])
async def test_no_other_server_is_asked_what_one_refuses(make: Make, body: Any) -> None:
    one, two = OpenAIServer(answer(400, body)), OpenAIServer()
    with pytest.raises(InvalidRequest):
        await complete(make(one=one, two=two), ASK)
    assert two.requests == []


async def test_refused_requests_of_one_client_do_not_affect_the_others(make: Make) -> None:
    server = OpenAIServer(*[answer(400)] * 3, Stream(FINE))
    model = make(a=server)
    for _ in range(3):
        with pytest.raises(InvalidRequest, match=r"refuses this request \(400\)"):
            await complete(model, ASK)
    assert server_of(model).state == "ready"
    assert (await complete(model, ASK)).text == "Fine."


async def test_if_all_fail_and_one_is_full_the_error_is_queue_full(make: Make) -> None:
    one, two = OpenAIServer(answer(429, Retry_After="3")), OpenAIServer(answer(500))
    with pytest.raises(QueueFull) as caught:
        await complete(make(one=one, two=two), ASK)
    assert caught.value.retry_after == 3


async def test_a_server_that_cannot_be_reached_is_left_out(make: Make) -> None:
    one, two = OpenAIServer(), OpenAIServer(Stream(FINE))
    one.away = httpx.ConnectError("refused")
    model = make(one=one, two=two)
    assert (await complete(model, ASK)).text == "Fine."
    first, second = model.status().servers
    assert (first.state, second.state) == ("away", "ready")
    assert first.reason == (
        "The hermes server one cannot be reached (ConnectError); start it, or correct its URL."
    )
    assert model.status().not_ready is None


async def test_the_first_server_that_is_ready_serves(make: Make) -> None:
    one, two = OpenAIServer(), OpenAIServer(Stream(FINE))
    one.is_silent = True
    model = make(one=one, two=two)
    await model.start()
    async with asyncio.timeout(10):
        assert (await complete(model, ASK)).text == "Fine."
    assert model.status().not_ready is None


@pytest.mark.parametrize("is_started", [True, False])
async def test_a_server_that_is_silent_from_the_start_is_named(
    make: Make, *, is_started: bool
) -> None:
    server = OpenAIServer()
    server.is_silent = True
    model = make(a=server)
    if is_started:
        await model.start()
    with pytest.raises(ModelUnavailable) as caught:
        await complete(model, ASK, Deadline.after(0.05))
    detail = "The hermes server a is being probed for its capabilities."
    assert (caught.value.detail, caught.value.retry_after) == (detail, 5)


@pytest.mark.parametrize(
    ("lost", "models", "probes"),
    [
        # It was only slow: it lists its models again.
        (httpx.ConnectTimeout("slow"), ["org/m-1"], 9),
        # It has another model.
        (httpx.ConnectTimeout("slow"), ["org/m-2"], 16),
        # It may have been started again with other options.
        (httpx.ConnectError("refused"), ["org/m-1"], 16),
    ],
)
async def test_capabilities_are_kept_over_an_outage_unless_they_may_have_changed(
    make: Make, lost: Exception, models: list[str], probes: int
) -> None:
    server = OpenAIServer(Stream(FINE), Stream(FINE))
    model = make(a=server)
    await complete(model, ASK)
    assert server.probes == 8
    server.away, server.models = lost, models
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        await complete(model, ASK)
    assert server_of(model).state == "away"
    server.away = None
    assert (await complete(model, ASK)).model == f"hermes/{models[0].removeprefix('org/')}"
    assert server.probes == probes
    assert server_of(model).schema == "regex"


async def test_a_server_that_is_reachable_again_is_probed_again(make: Make) -> None:
    server = OpenAIServer(Stream(FINE), Stream(FINE))
    model = make(a=server)
    await complete(model, ASK)
    server.away = httpx.ConnectError("refused")
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match="cannot be reached"):
            await complete(model, ASK)
    assert model.status().state == "failed"
    server.away, server.schema_formats = None, {"json_schema"}
    assert (await complete(model, ASK)).text == "Fine."
    assert server_of(model).schema == "json_schema"
    assert model.status().restarts == 1


async def test_a_full_server_gets_no_request_before_its_retry_after(make: Make) -> None:
    server = OpenAIServer(answer(429, Retry_After="30"))
    model = make(a=server)
    for _ in range(2):
        with pytest.raises(QueueFull) as caught:
            await complete(model, ASK)
        assert caught.value.retry_after == 30
    assert len(server.requests) == 1
    assert server_of(model).state == "resting"
    # It works, so the sidecar is ready.
    assert model.status().not_ready is None


async def test_a_full_server_is_asked_again_after_half_a_minute_at_most(make: Make) -> None:
    model = make(a=OpenAIServer(answer(429, Retry_After="3600")))
    waits = []
    for _ in range(2):
        with pytest.raises(QueueFull) as caught:
            await complete(model, ASK)
        waits.append(caught.value.retry_after)
    assert waits == [3600, 30]


async def test_after_three_failures_a_server_rests(make: Make) -> None:
    server = OpenAIServer(*[answer(500)] * 3)
    model = make(a=server)
    for _ in range(4):
        with pytest.raises(ModelUnavailable, match="status 500"):
            await complete(model, ASK)
    assert len(server.requests) == 3
    assert server_of(model).state == "resting"
    assert model.status().not_ready is not None


async def test_after_its_rest_a_server_gets_one_request_at_a_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.CircuitBreaker._rest", no_rest)
    trial = GatedStream(FINE)
    server = OpenAIServer(*[answer(500)] * 3, trial, Stream(FINE))
    model = make(a=server)
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="status 500"):
            await complete(model, ASK)
    trying = asyncio.create_task(complete(model, ASK))
    await trial.begun.wait()
    with pytest.raises(ModelUnavailable, match="status 500") as caught:
        await complete(model, ASK)
    assert caught.value.retry_after == 1
    assert len(server.requests) == 4
    trial.gate.set()
    assert (await trying).text == "Fine."
    assert (await complete(model, ASK)).text == "Fine."


async def test_after_its_rest_a_server_that_answers_gets_the_next_request(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.CircuitBreaker._rest", no_rest)
    server = OpenAIServer(*[answer(500)] * 3, Stream(FINE), Stream(FINE))
    model = make(a=server)
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="status 500"):
            await complete(model, ASK)
    async with aclosing(model.stream(ASK)) as stream:
        assert (await anext(stream)).text == "Fi"
        assert (await complete(model, ASK)).text == "Fine."


async def test_an_answer_lets_only_one_further_request_through(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.CircuitBreaker._rest", no_rest)
    trial = GatedStream(FINE)
    server = OpenAIServer(*[answer(500)] * 3, Stream(FINE), trial)
    model = make(a=server)
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="status 500"):
            await complete(model, ASK)
    async with aclosing(model.stream(ASK)) as stream:
        assert (await anext(stream)).text == "Fi"
        trying = asyncio.create_task(complete(model, ASK))
        await trial.begun.wait()
        assert (await anext(stream)).text == "ne."
        with pytest.raises(ModelUnavailable, match="status 500"):
            await complete(model, ASK)
    trial.gate.set()
    assert (await trying).text == "Fine."


async def test_texts_that_the_deadline_ends_are_no_failures(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.server._LEAST_SILENCE", 0.0)
    model = make(a=OpenAIServer(*[Stream([FINE[0], TimeoutError()]) for _ in range(3)]))
    for _ in range(3):
        completion = await complete(model, ASK, Deadline.after(20), allow_partial=True)
        assert completion.finish_reason == "deadline"
    assert server_of(model).state == "ready"


@pytest.mark.parametrize(("least_silence", "state"), [(10.0, "ready"), (0.0, "resting")])
async def test_silence_is_a_failure_if_the_server_had_enough_time(
    make: Make, monkeypatch: pytest.MonkeyPatch, least_silence: float, state: str
) -> None:
    monkeypatch.setattr("llm_sidecar.models.remote.server._LEAST_SILENCE", least_silence)
    model = make(a=OpenAIServer(*[TimeoutError()] * 3))
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            await complete(model, ASK)
    assert server_of(model).state == state


async def test_a_success_resets_the_number_of_failures(make: Make) -> None:
    bad = answer(500)
    server = OpenAIServer(bad, bad, Stream(FINE), bad, bad)
    model = make(a=server)
    for _ in range(2):
        with pytest.raises(ModelUnavailable):
            await complete(model, ASK)
    await complete(model, ASK)
    for _ in range(2):
        with pytest.raises(ModelUnavailable):
            await complete(model, ASK)
    assert server_of(model).state == "ready"
