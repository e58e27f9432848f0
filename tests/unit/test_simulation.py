"""The simulation of replicas, where the right result can be calculated."""

from __future__ import annotations

import math

import pytest

from benchmarks.simulation import Machine, Replica, Workload, limit, simulate

ALONE = Replica(prefill=100.0, steps=(0.02,), threads=0)
"""One request at a time, and no cores."""
MANY = Machine(cores=64)


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_replicas_that_only_wait_multiply_the_throughput(replicas: int) -> None:
    workload = Workload(4 * replicas, requests=20 * replicas, completion_tokens=60)
    served = simulate(workload, ALONE, MANY, replicas)
    # 60 steps of 20 ms.
    assert served.per_second == pytest.approx(replicas / 1.2)
    assert limit(workload, ALONE, MANY, replicas) == pytest.approx(replicas / 1.2)
    assert len(served.latencies) == 20 * replicas


def test_a_request_waits_for_those_before_it() -> None:
    served = simulate(Workload(3, requests=3, completion_tokens=50), ALONE, MANY, 1)
    assert served.latencies == pytest.approx([1.0, 2.0, 3.0])
    assert served.percentile(50) == pytest.approx(2.0)


def test_the_prefill_comes_before_the_first_token() -> None:
    workload = Workload(1, requests=1, prompt_tokens=50, completion_tokens=50)
    assert simulate(workload, ALONE, MANY, 1).latencies == pytest.approx([1.5])


def test_requests_share_the_steps_of_a_batch() -> None:
    batch = Replica(100.0, (0.02, 0.03), threads=0)
    served = simulate(Workload(2, requests=2, completion_tokens=50), batch, MANY, 1)
    # The second one joins after the first step, and generates its last token alone.
    assert served.latencies == pytest.approx([0.02 + 49 * 0.03, 0.02 + 49 * 0.03 + 0.02])
    most = limit(Workload(2, completion_tokens=50), batch, MANY, 1)
    assert most == pytest.approx(2 / (50 * 0.03))


@pytest.mark.parametrize(
    ("clients", "replicas", "expected"),
    [
        # Batches of two are the best; with one client for each replica there are none.
        (8, 1, 2 / (50 * 0.03)),
        (8, 4, 4 * 2 / (50 * 0.03)),
        (8, 8, 8 / (50 * 0.02)),
        (0, 8, 8 * 2 / (50 * 0.03)),
    ],
)
def test_the_limit_is_that_of_the_best_batch(clients: int, replicas: int, expected: float) -> None:
    batch = Replica(100.0, (0.02, 0.03, 0.08), threads=0)
    workload = Workload(clients, completion_tokens=50)
    assert limit(workload, batch, MANY, replicas) == pytest.approx(expected)


def test_the_prefill_of_one_request_delays_the_other() -> None:
    batch = Replica(100.0, (0.02, 0.02), threads=0)
    workload = Workload(2, requests=2, prompt_tokens=10, completion_tokens=2)
    first, second = simulate(workload, batch, MANY, 1).latencies
    # Each prefill takes 0.1 s; the second one falls into the second step of the first one.
    assert (first, second) == pytest.approx((0.12 + 0.12, 0.12 + 0.12 + 0.02))


def test_busy_replicas_share_the_cores() -> None:
    busy = Replica(100.0, (0.02,), threads=1)
    workload = Workload(4, requests=400, completion_tokens=10)
    four = simulate(workload, busy, Machine(cores=2), 4)
    assert four.per_second == pytest.approx(10.0, rel=0.01)
    assert limit(workload, busy, Machine(cores=2), 4) == pytest.approx(10.0)
    assert limit(workload, busy, Machine(cores=2), 1) == pytest.approx(5.0)


def test_the_api_process_limits_the_throughput() -> None:
    machine = Machine(cores=64, api_request=0.1, api_token=0.01)
    workload = Workload(8, requests=200, completion_tokens=10)
    assert limit(workload, ALONE, machine, 8) == pytest.approx(5.0)
    assert simulate(workload, ALONE, machine, 8).per_second == pytest.approx(5.0, rel=0.05)


def test_random_arrivals_are_the_same_for_the_same_seed() -> None:
    workload = Workload(per_second=0.5, requests=400, completion_tokens=10)
    one, same = (simulate(workload, ALONE, MANY, 1, seed=3) for _ in range(2))
    assert one.latencies == same.latencies
    assert one.latencies != simulate(workload, ALONE, MANY, 1, seed=4).latencies
    assert one.per_second == pytest.approx(0.5, rel=0.15)
    # The mean time in an M/D/1 queue: service, and the wait for it (Pollaczek and Khinchine).
    load, service = 0.5 * 0.2, 0.2
    expected = service + load * service / (2 * (1 - load))
    assert sum(one.latencies) / 400 == pytest.approx(expected, rel=0.05)


def test_without_work_of_the_api_process_only_the_replicas_limit() -> None:
    idle = Replica(100.0, (0.0,), threads=0)
    workload = Workload(1, prompt_tokens=100)
    assert limit(workload, idle, MANY, 2) == pytest.approx(2.0)
    assert math.isfinite(limit(workload, idle, MANY, 64))
