"""Two sidecars behind the proxy of deploy/scale; tests/long/test_scale.py has a longer series."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from tests.programs import require_program
from tests.scale_cluster import CONFIGURATION, NAMES, TwoSidecars, two_sidecars
from tests.scale_load import Load, Stored
from tests.unit.services.samples import PROMPT

PROPOSE = "/propose_trade_adjustments/"
BODY = {"prompt": PROMPT, "max_length": 128}
SECONDS = 0.1
"""The time of a generation; a proposal has two."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSidecars]:
    folder = tmp_path_factory.mktemp("scale")
    with two_sidecars(folder, app="tests.quick_app:app", QUICK_SECONDS=str(SECONDS)) as two:
        yield two


def running(two: TwoSidecars) -> int:
    """How many generations run."""
    return sum(server.client.get("/running").json() for server in two.both)


def expire_locks(two: TwoSidecars) -> None:
    """Lets the locks of requests expire, when no live sidecar needs them any more."""
    with Redis(port=two.redis.port) as redis:
        for name in redis.scan_iter("osiris.events.request:*.lock"):
            redis.pexpire(name, round(10 * SECONDS * 1000))


def test_haproxy_takes_the_configuration_without_a_warning() -> None:
    haproxy = require_program("haproxy")
    addresses = {"SIDECAR_A": "127.0.0.1:8001", "SIDECAR_B": "127.0.0.1:8002"}
    done = subprocess.run(
        [haproxy, "-c", "-dW", "-f", str(CONFIGURATION)],
        env=addresses,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "Configuration file is valid\n"), done.stderr


def rows_written(two: TwoSidecars) -> list[int]:
    """The rows of each."""
    return [server.client.get("/health").json()["database"]["rows_written"] for server in two.both]


def test_requests_at_once_are_shared_by_both(two: TwoSidecars) -> None:
    def propose(_: int) -> int:
        return two.proxy.client.post(PROPOSE, json=BODY).status_code

    before = rows_written(two)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(propose, range(4))) == [200] * 4
    # A run, a proposal and a score each.
    assert [now - then for now, then in zip(rows_written(two), before, strict=True)] == [6, 6]


def test_a_stream_is_passed_on_as_it_comes(two: TwoSidecars) -> None:
    times = {}
    headers = {"Accept": "text/event-stream"}
    with two.proxy.client.stream("POST", PROPOSE, json=BODY, headers=headers) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                times[line.removeprefix("event: ")] = time.monotonic()
    # The critique takes its time after the proposal.
    assert times["done"] - times["proposal"] > SECONDS / 2


def test_a_client_that_disconnects_stops_its_generation(two: TwoSidecars) -> None:
    with httpx.Client(base_url=two.proxy.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post(PROPOSE, json=BODY, timeout=SECONDS / 2)
    two["a"].wait_until(lambda: running(two) == 0, seconds=SECONDS, interval=0.005)


def test_a_sidecar_that_ends_costs_no_request(two: TwoSidecars) -> None:
    load = Load(two, clients=4, inbox=False)

    def restart() -> None:
        assert two.stop("b") == 0
        two.start("b")

    load.run(20, halfway=restart)
    assert len(load.answered) == 20


def test_nothing_is_lost_or_doubled_though_a_sidecar_is_killed(two: TwoSidecars) -> None:
    load, stored, count = Load(two, clients=8, inbox=False), Stored(two), 40

    def kill() -> None:
        two.kill("a")
        expire_locks(two)

    load.run(count, halfway=kill)
    two.start("a")
    two.wait_until_ready("a")
    stored.settle(load)
    stored.assert_once(load, count)
    for name in NAMES:
        two.start(name)
