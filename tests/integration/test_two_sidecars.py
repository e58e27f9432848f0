"""Two sidecars with journals of their own, one Redis, and one database on an object store."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, entries, require_redis
from tests.s3_server import BUCKET, S3Server
from tests.unit.services.samples import PROMPT, PROPOSAL

PROPOSE = "/propose_trade_adjustments/"
BODY = {"prompt": PROMPT, "max_length": 128}


class Two:
    """The two sidecars, and what they share.

    Attributes:
        one, other: the sidecars.
        redis: their Redis.
        adapters: the folders of adapters of each.
    """

    def __init__(self, folder: Path, redis: RedisServer, s3: S3Server) -> None:
        self.redis = redis
        self.adapters: dict[str, Path] = {}
        self._folder = folder
        self._s3 = s3

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[LiveServer]:
        """A sidecar with a machine of its own: its journal and its adapters."""
        folder = self._folder / name
        self.adapters[name] = folder / "adapters"
        for day in ("20260101", "20260102"):
            (folder / "adapters" / day).mkdir(parents=True)
            (folder / "adapters" / day / "adapter_config.json").touch()
        environ = self._s3.environ() | {
            "REDIS_URL": self.redis.url,
            "LANCEDB_URI": f"s3://{BUCKET}/db",
            "LANCEDB_LOG_DIR": str(folder / "log"),
            "PHI3_ADAPTER_DIR": str(folder / "adapters"),
        }
        with serve(folder, app="tests.quick_app:app", **environ) as server:
            yield server

    def start(self, one: LiveServer, other: LiveServer) -> None:
        self.one, self.other = one, other
        for server in self.both:
            server.wait_until_database_is_open()
            server.wait_until(functools.partial(is_connected, server))

    @property
    def both(self) -> tuple[LiveServer, LiveServer]:
        return self.one, self.other

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The payloads of the events of a type in the stream."""
        with Redis(port=self.redis.port, decode_responses=True) as client:
            found = entries(client, "osiris.events")
        return [json.loads(fields["data"]) for _, fields in found if fields["type"] == kind]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    require_redis()
    s3 = S3Server()
    try:
        asyncio.run(s3.create_bucket())
        with RedisServer() as redis:
            two = Two(tmp_path_factory.mktemp("two"), redis, s3)
            with two.running("one") as one, two.running("other") as other:
                two.start(one, other)
                yield two
    finally:
        s3.end()


def health(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/health").json()
    return found


def is_connected(server: LiveServer) -> bool:
    return bool(health(server)["event_bus"]["connected"])


def adapter(server: LiveServer) -> str | None:
    found: str | None = health(server)["models"]["phi3"]["adapter"]
    return found


def has_adapter(server: LiveServer, name: str) -> bool:
    return adapter(server) == name


def propose(server: LiveServer, **headers: str) -> httpx.Response:
    answer = server.client.post(PROPOSE, json=BODY, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def correct(server: LiveServer, transaction_id: str) -> tuple[str, str]:
    """Sends a correction; returns its id and the message."""
    body = {
        "transaction_id": transaction_id,
        "feedback_type": "correction",
        "feedback_content": "The stop is too tight.",
        "corrected_proposal": PROPOSAL,
    }
    answer = server.client.post("/feedback/phi3/", json=body)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Feedback-ID"], answer.json()["message"]


def uses(server: LiveServer, feedback_id: str) -> bool:
    """Whether feedback is one of the examples."""
    found = server.client.get("/examples/").json()["items"]
    return feedback_id in {item["feedback_id"] for item in found}


def has_withdrawn(server: LiveServer, feedback_id: str) -> bool:
    return not uses(server, feedback_id)


def seconds_until(
    condition: Callable[..., bool], servers: Sequence[LiveServer], *rest: Any
) -> float:
    """The seconds until `condition(server, *rest)` holds for each server."""
    began = time.monotonic()
    for server in servers:
        server.wait_until(functools.partial(condition, server, *rest), seconds=20.0)
    return time.monotonic() - began


def at_once(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def test_corrections_and_withdrawals_are_right_on_both_within_two_seconds(two: Two) -> None:
    waits = []
    for turn in range(4):
        asked, corrected = two.both if turn % 2 else reversed(two.both)
        # The run is still in the journal of the machine that was asked.
        transaction_id = propose(asked).json()["transaction_id"]
        feedback_id, message = correct(corrected, transaction_id)
        waits.append(seconds_until(uses, two.both, feedback_id))
        assert "is not an example" not in message
        # The feedback is new to the machine that withdraws it.
        answer = asked.client.delete(f"/feedback/{feedback_id}")
        assert answer.status_code == 200
        waits.append(seconds_until(has_withdrawn, two.both, feedback_id))
    assert max(waits) < 2.0, waits


def test_feedback_can_be_withdrawn_on_the_other_sidecar_right_after(two: Two) -> None:
    rating = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
    for sent, withdrawn in (two.both, two.both[::-1]):
        answer = sent.client.post("/feedback/phi3/", json=rating)
        feedback_id = answer.headers["X-Feedback-ID"]
        assert withdrawn.client.delete(f"/feedback/{feedback_id}").status_code == 200
    assert two.one.client.delete("/feedback/unknown").status_code == 404


def test_a_key_that_both_get_at_once_is_answered_once(two: Two) -> None:
    written = sum(health(server)["database"]["rows_written"] for server in two.both)
    for number in range(20):
        key = {"Idempotency-Key": f"both-{number}"}
        answers = at_once(*(functools.partial(propose, server, **key) for server in two.both))
        assert answers[0].json() == answers[1].json()
        replayed = [answer.headers.get("Idempotent-Replayed") for answer in answers]
        assert sorted(map(str, replayed)) == ["None", "true"]
        later = [propose(server, **key) for server in two.both]
        assert [answer.headers["Idempotent-Replayed"] for answer in later] == ["true", "true"]
        assert {answer.text for answer in later} == {answers[0].text}
    # A run, a proposal and a score each.
    rows = sum(health(server)["database"]["rows_written"] for server in two.both) - written
    assert rows == 20 * 3


def test_a_key_with_another_body_is_refused_on_the_other_sidecar(two: Two) -> None:
    propose(two.one, **{"Idempotency-Key": "body"})
    other = BODY | {"prompt": "Short XYZ from 50."}
    answer = two.other.client.post(PROPOSE, json=other, headers={"Idempotency-Key": "body"})
    assert answer.status_code == 422


def test_a_request_of_a_machine_that_has_died_is_executed_under_the_same_id(two: Two) -> None:
    body = {"prompt": PROMPT, "max_length": 129}
    key = {"Idempotency-Key": "died"}
    first = two.one.client.post(PROPOSE, json=body, headers=key).json()
    with Redis(port=two.redis.port, decode_responses=True) as client:
        for name in client.keys("osiris.events.request:*"):
            record = json.loads(str(client.get(name)))
            if first["transaction_id"] in (record["response"] or ""):
                break
        # The machine has died before it saved its answer.
        client.set(name, json.dumps(record | {"response": None}))
        client.set(f"{name}.lock", "of a dead machine", px=700)
    began = time.monotonic()
    answer = two.other.client.post(PROPOSE, json=body, headers=key)
    assert time.monotonic() - began > 0.5
    assert "Idempotent-Replayed" not in answer.headers
    assert answer.json() == first


def test_a_swap_changes_every_sidecar_and_a_later_one(two: Two) -> None:
    for server, name in ((two.one, "20260101"), (two.other, "20260102")):
        answer = server.client.post("/adapters/swap", json={"adapter": name})
        assert (answer.status_code, adapter(server)) == (200, name)
        seconds_until(has_adapter, two.both, name)
    two.one.wait_until(lambda: len(two.events("phi3.adapter.swapped")) == 2)
    swapped = two.events("phi3.adapter.swapped")
    assert [(event["previous"], event["adapter"]) for event in swapped] == [
        (None, "20260101"),
        ("20260101", "20260102"),
    ]
    assert set(swapped[0]) == {"adapter", "previous", "timestamp"}
    with two.running("later") as later:
        later.wait_until(lambda: adapter(later) == "20260102")


def test_a_sidecar_without_the_adapter_keeps_its_own_and_says_so(two: Two) -> None:
    for name in ("20260102", "20260103"):
        (two.adapters["one"] / "20260103").mkdir(exist_ok=True)
        (two.adapters["one"] / "20260103" / "adapter_config.json").touch()
        answer = two.one.client.post("/adapters/swap", json={"adapter": name})
        assert answer.status_code == 200
    problem = "PHI3_ADAPTER_DIR does not hold the adapter 20260103, which the other sidecars use."
    two.other.wait_until(lambda: health(two.other)["phi3_adapter_problem"] == problem)
    found = health(two.other)
    assert (found["status"], found["phi3_adapter_date"]) == ("partial_error", "2026-01-02")
    assert adapter(two.one) == "20260103"
    two.one.client.post("/adapters/swap", json={"adapter": "20260101"})
    two.other.wait_until(lambda: health(two.other)["phi3_adapter_problem"] is None)
    assert adapter(two.other) == "20260101"


def test_while_redis_hangs_a_key_holds_on_one_machine_and_afterwards_on_both(two: Two) -> None:
    two.redis.freeze()
    try:
        first = propose(two.one, **{"Idempotency-Key": "hangs"})
        again = propose(two.one, **{"Idempotency-Key": "hangs"})
        assert (again.text, again.headers["Idempotent-Replayed"]) == (first.text, "true")
        answer = two.one.client.post("/adapters/swap", json={"adapter": "20260102"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json()["detail"] == (
            "Redis is away or cannot serve the adapter in use; try again."
        )
        assert adapter(two.one) == "20260101"
    finally:
        two.redis.thaw()
    for server in two.both:
        server.wait_until(functools.partial(is_connected, server))

    def is_shared() -> bool:
        with Redis(port=two.redis.port, decode_responses=True) as client:
            names = client.keys("osiris.events.request:*")
            return any(first.json()["transaction_id"] in str(client.get(name)) for name in names)

    two.one.wait_until(is_shared)
    shared = propose(two.other, **{"Idempotency-Key": "hangs"})
    assert (shared.text, shared.headers["Idempotent-Replayed"]) == (first.text, "true")


def test_a_redis_that_has_lost_its_data_gets_the_adapter_in_use_again(two: Two) -> None:
    before = adapter(two.one)
    two.redis.kill()
    two.one.wait_until(lambda: not health(two.one)["event_bus"]["connected"])
    two.redis.start()
    with Redis(port=two.redis.port, decode_responses=True) as client:

        def agreed() -> Any:
            found = client.get("osiris.events.adapter")
            return found and json.loads(str(found))

        assert two.one.wait_until(agreed)["value"]["adapter"] == before
    assert [adapter(server) for server in two.both] == [before, before]
    name = "20260102"
    two.other.client.post("/adapters/swap", json={"adapter": name})
    seconds_until(has_adapter, two.both, name)
