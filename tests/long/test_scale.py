"""A thousand proposals, feedback and events for two sidecars behind the proxy, while one of them is
killed: `SCALE=10000 pytest tests/long/test_scale.py`."""

from __future__ import annotations

import functools
import os
import statistics
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from redis import Redis

from tests.live_server import LiveServer
from tests.scale_cluster import NAMES, two_sidecars
from tests.scale_load import Load, Stored
from tests.unit.services.samples import PROMPT, PROPOSAL

COUNT = int(os.environ.get("SCALE", "1000"))
SECONDS = 120.0 + COUNT / 20
"""Within which all is stored. What a killed sidecar has read from the inbox is claimed after a
minute."""
PROPOSE = "/propose_trade_adjustments/"
BODY = {"prompt": PROMPT, "max_length": 128}


def test_nothing_is_lost_or_doubled_though_a_sidecar_is_killed(tmp_path: Path) -> None:
    with two_sidecars(tmp_path, app="tests.quick_app:app", QUICK_SECONDS="0.05") as two:
        load, stored = Load(two, clients=16), Stored(two)
        began = time.monotonic()

        def restart() -> None:
            two.kill("a")
            two.start("a")

        load.run(COUNT, halfway=restart)
        print(f"{COUNT} proposals and as much feedback in {time.monotonic() - began:.0f} s")
        two.wait_until_ready("a")
        stored.settle(load, SECONDS)
        print(f"stored after {time.monotonic() - began:.0f} s")
        stored.assert_once(load, COUNT)
        with Redis(port=two.redis.port) as redis:
            assert redis.xlen("osiris.inbox.dead") == 0


def propose(server: LiveServer, key: str) -> httpx.Response:
    headers = {"Idempotency-Key": key}
    return httpx.post(f"{server.url}{PROPOSE}", json=BODY, headers=headers, timeout=60.0)


def test_the_request_of_a_sidecar_that_is_killed_is_answered_once(tmp_path: Path) -> None:
    with two_sidecars(tmp_path, app="tests.quick_app:app", QUICK_SECONDS="1") as two:
        key, stored = str(uuid.uuid4()), Stored(two)
        with ThreadPoolExecutor(1) as threads:
            lost = threads.submit(propose, two["a"], key)
            # In its critique: the proposal is in the journal, and its event in the stream.
            two["a"].wait_until(lambda: stored.events("phi3.proposal.created", "transaction_id"))
            two.kill("a")
            assert isinstance(lost.exception(), httpx.TransportError)
        began = time.monotonic()
        answer = propose(two["b"], key)
        waited = time.monotonic() - began
        print(f"answered {waited:.1f} s after the kill")
        assert answer.status_code == 200
        assert "Idempotent-Replayed" not in answer.headers
        # A lock lasts for 15 s after it was last renewed, and the request takes two.
        assert 10.0 < waited < 20.0
        two.start("a")
        two.wait_until_ready("a")
        for server in two.both:
            again = propose(server, key)
            assert (again.text, again.headers["Idempotent-Replayed"]) == (answer.text, "true")
        for name in NAMES:
            two.stop(name)
        once = {answer.json()["transaction_id"]: 1}
        for table, name in (
            ("orchestrator_runs", "run_id"),
            ("proposals", "transaction_id"),
            ("hermes_scores", "run_id"),
        ):
            assert stored.column(table, name) == once
        for kind, name in (
            ("phi3.proposal.created", "transaction_id"),
            ("phi3.proposal.assessed", "proposal_transaction_id"),
        ):
            assert stored.events(kind, name) == once


def uses(server: LiveServer, feedback_id: str) -> bool:
    items = server.client.get("/examples/").json()["items"]
    return feedback_id in {item["feedback_id"] for item in items}


def has_withdrawn(server: LiveServer, feedback_id: str) -> bool:
    return not uses(server, feedback_id)


def test_twenty_corrections_are_seen_by_both_within_two_seconds(tmp_path: Path) -> None:
    with two_sidecars(tmp_path, app="tests.quick_app:app") as two:
        client, waits = two.proxy.client, []
        for _ in range(20):
            transaction_id = client.post(PROPOSE, json=BODY).json()["transaction_id"]
            correction = {
                "transaction_id": transaction_id,
                "feedback_type": "correction",
                "feedback_content": "The stop is too tight.",
                "corrected_proposal": PROPOSAL,
            }
            answer = client.post("/feedback/phi3/", json=correction)
            feedback_id = answer.headers["X-Feedback-ID"]
            for is_seen in (uses, has_withdrawn):
                began = time.monotonic()
                for server in two.both:
                    server.wait_until(functools.partial(is_seen, server, feedback_id))
                waits.append(time.monotonic() - began)
                client.delete(f"/feedback/{feedback_id}")
        print(f"seen by both after {statistics.median(waits):.2f} s, at most {max(waits):.2f} s")
        assert max(waits) < 2.0
