"""When a server gets no requests."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from llm_sidecar.errors import ModelUnavailable, QueueFull
from llm_sidecar.models.remote.breaker import CircuitBreaker

FAILURE = ModelUnavailable("It crashed.", retry_after=1)


class Clock:
    """Replaces the module `time`.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("llm_sidecar.models.remote.breaker.time", made)
    return made


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with breaker.request():
            breaker.failed(FAILURE)


def wait_of(breaker: CircuitBreaker) -> int | None:
    """The `Retry-After` of the refusal; None without one."""
    refusal = breaker.refusal()
    return None if refusal is None else refusal.retry_after


def test_the_third_failure_opens_the_circuit(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 2)
    assert breaker.refusal() is None
    fail(breaker, 1)
    refusal = breaker.refusal()
    assert isinstance(refusal, ModelUnavailable)
    assert (refusal.detail, refusal.retry_after) == ("It crashed.", 1)
    clock.now += 1.0
    assert breaker.refusal() is None


def test_each_further_failure_doubles_the_rest_up_to_half_a_minute(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 2)
    waits = []
    for _ in range(7):
        fail(breaker, 1)
        waits.append(wait_of(breaker))
        clock.now += 30.0
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_a_server_may_fail_for_days(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 3000)
    assert wait_of(breaker) == 30


def test_a_half_open_circuit_lets_one_request_through(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 3)
    clock.now += 1.0
    with breaker.request():
        assert wait_of(breaker) == 1
    # It ended without a success, for example because its client disconnected.
    assert breaker.refusal() is None
    with breaker.request():
        assert wait_of(breaker) == 1
        breaker.succeeded()
        assert breaker.refusal() is None
    with breaker.request():
        assert breaker.refusal() is None


def test_the_beginning_of_an_answer_lets_the_next_request_through(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 3)
    clock.now += 1.0
    with breaker.request():
        breaker.answers()
        assert breaker.refusal() is None
        with breaker.request():
            assert wait_of(breaker) == 1
    # The circuit is still half-open: the next failure opens it.
    fail(breaker, 1)
    assert wait_of(breaker) == 2


def test_the_end_of_one_request_does_not_end_the_trial_of_the_next(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 3)
    clock.now += 1.0
    first, second = ExitStack(), ExitStack()
    first.enter_context(breaker.request())
    breaker.answers()
    second.enter_context(breaker.request())
    first.close()
    assert wait_of(breaker) == 1
    second.close()
    assert breaker.refusal() is None


def test_a_closed_circuit_lets_all_requests_through(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, 2)
    with breaker.request(), breaker.request():
        assert breaker.refusal() is None


@pytest.mark.parametrize(("said", "wait"), [(7, 7), (3600, 30), (None, 1)])
def test_a_full_server_rests_as_long_as_it_says(clock: Clock, said: int | None, wait: int) -> None:
    breaker = CircuitBreaker()
    breaker.is_full(QueueFull("It is full.", retry_after=said))
    refusal = breaker.refusal()
    assert isinstance(refusal, QueueFull)
    assert (refusal.detail, refusal.retry_after) == ("It is full.", wait)
    clock.now += wait
    # It works, so all requests may try at once.
    with breaker.request():
        assert breaker.refusal() is None
