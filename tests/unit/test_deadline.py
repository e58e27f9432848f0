"""The error at a deadline: which phases took the time, and what helps."""

from __future__ import annotations

import time

import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DeadlineExceeded, TimeSpent
from llm_sidecar.telemetry.calls import ModelCall

NOW = 1000.0


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: NOW)


def exceeded(
    queued: float, begun: float | None = None, first_token: float | None = None
) -> DeadlineExceeded:
    """The error of a call at a deadline of 60 s; the times are seconds after the request began."""
    began = NOW - 60.0

    def at(seconds: float | None) -> float | None:
        return None if seconds is None else began + seconds

    call = ModelCall("hermes", "generate", queued=began + queued)
    call.begun, call.first_token = at(begun), at(first_token)
    return Deadline(began, 60.0).exceeded(call, 7)


def test_the_deadline_is_counted_from_the_request() -> None:
    assert Deadline.after(60.0) == Deadline(NOW, 60.0)
    assert Deadline(NOW - 20.0, 60.0).remaining() == 40.0
    assert Deadline(NOW - 70.0, 60.0).remaining() == -10.0


async def test_its_timeout_ends_with_it() -> None:
    assert Deadline(NOW - 20.0, 60.0).timeout().when() == NOW + 40.0


def test_a_deadline_that_has_passed_has_no_timeout() -> None:
    with pytest.raises(TimeoutError):
        Deadline(NOW - 60.0, 60.0).timeout()


def test_every_phase_is_named_and_the_retry_passed_on() -> None:
    error = exceeded(0.0, 2.0, 57.0)
    assert error.spent == TimeSpent(before=0.0, waiting=2.0, prefill=55.0, decode=3.0)
    assert error.retry_after == 7
    assert error.detail == (
        "hermes did not answer within 60 s: 2.0 s waiting, 55.0 s in prefill, "
        "3.0 s in decode; shorten the prompt, or raise REQUEST_TIMEOUT_SECONDS."
    )


def test_what_came_before_the_call_is_named() -> None:
    error = exceeded(40.0, 41.0, 42.0)
    assert error.spent == TimeSpent(before=40.0, waiting=1.0, prefill=1.0, decode=18.0)
    assert error.detail == (
        "hermes did not answer within 60 s: 40.0 s in earlier model calls, 1.0 s waiting, "
        "1.0 s in prefill, 18.0 s in decode; try again, or raise REQUEST_TIMEOUT_SECONDS."
    )


@pytest.mark.parametrize(
    ("times", "remedy"),
    [
        ((0.0, None, None), "; try again later."),
        ((0.0, 31.0, 50.0), "; try again later."),
        ((0.0, 1.0, None), "; shorten the prompt, or raise REQUEST_TIMEOUT_SECONDS."),
        ((0.0, 1.0, 2.0), "; lower max_length if you can, or raise REQUEST_TIMEOUT_SECONDS."),
    ],
)
def test_the_remedy_fits_the_longest_phase(
    times: tuple[float, float | None, float | None], remedy: str
) -> None:
    assert exceeded(*times).detail.endswith(remedy)
