"""The delays between restarts of a worker."""

from __future__ import annotations

import pytest

from llm_sidecar.models.local.backoff import Backoff


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)


def test_each_failure_doubles_the_delay_up_to_half_a_minute() -> None:
    backoff = Backoff()
    assert [backoff.delay(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_worker_may_fail_for_days() -> None:
    backoff = Backoff()
    assert [backoff.delay(1.0) for _ in range(3000)][-1] == 30.0


def test_after_a_minute_of_work_the_restart_is_immediate() -> None:
    backoff = Backoff()
    assert backoff.delay(1.0) == 0.5
    assert backoff.delay(60.1) == 0.0
    assert backoff.delay(60.0) == 0.5
