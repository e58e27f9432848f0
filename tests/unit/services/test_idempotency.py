"""Requests with an `Idempotency-Key`: one attempt at a time, and kept answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from llm_sidecar.db.transaction import Claim, Progress, RequestKey, Transaction
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded, RequestKeyReused
from llm_sidecar.event_bus.request_records import RequestRecords
from llm_sidecar.services import idempotency as module
from llm_sidecar.services.idempotency import Attempt, Idempotency
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeMetrics, FakeRecords, FakeStore, Happened, until

REQUEST = RequestKey("desk", "k-1")


class Made:
    """The service of one machine, over a fake store.

    Args:
        timeout: of a request.
        records: what it shares with other machines; default: nothing.
    """

    def __init__(self, timeout: float = 60.0, records: FakeRecords | None = None) -> None:
        self.happened = Happened()
        self.store = FakeStore(self.happened)
        self.tasks = TaskSet()
        metrics = FakeMetrics(self.happened)
        shared = cast(RequestRecords, records or FakeRecords(away=True))
        self.idempotency = Idempotency(
            self.store.store, shared, self.tasks, metrics, timeout=timeout
        )

    async def begin(self, fingerprint: str = "f-1") -> Attempt:
        begun = await self.idempotency.begin(REQUEST, fingerprint)
        assert isinstance(begun, Attempt)
        return begun

    async def end(self, attempt: Attempt) -> None:
        self.idempotency.end(attempt)
        await self.tasks.join()

    async def progress(self, attempt: Attempt, **state: Any) -> None:
        await self.store.commit(Transaction(progress=attempt.progress(state)))


async def test_a_new_request_has_no_state_and_the_deadline_of_a_request() -> None:
    attempt = await Made(timeout=7.0).begin()
    assert (attempt.request, attempt.state) == (REQUEST, None)
    assert 6.0 < attempt.deadline.remaining() <= 7.0


@pytest.mark.parametrize("has_key", [True, False])
async def test_the_work_of_an_attempt_is_that_of_the_sidecar(has_key: bool) -> None:
    made, ended = Made(), asyncio.Event()
    attempt = await made.begin() if has_key else made.idempotency.without_key()
    attempt.tasks.start(ended.wait())
    joining = asyncio.create_task(made.tasks.join())
    await asyncio.sleep(0)
    assert not joining.done()
    ended.set()
    await joining


async def test_an_answer_is_kept_and_repeated() -> None:
    made = Made()
    attempt = await made.begin()
    await made.idempotency.keep(attempt, b"the answer")
    await made.end(attempt)
    # The answer has ended the claim.
    assert made.store.released == []
    assert await made.idempotency.begin(REQUEST, "f-1") == b"the answer"
    assert made.happened.of("metric") == [("replayed", None)]


async def test_another_content_is_refused() -> None:
    made = Made()
    await made.idempotency.keep(await made.begin(), b"the answer")
    with pytest.raises(RequestKeyReused):
        await made.begin("f-2")


async def test_the_next_attempt_goes_on_from_the_state_of_a_failed_one() -> None:
    made = Made()
    attempt = await made.begin()
    await made.progress(attempt, step=1)
    await made.progress(attempt, step=2)
    await made.end(attempt)
    assert (await made.begin()).state == {"step": 2}


async def test_a_failed_attempt_without_a_state_is_forgotten() -> None:
    made = Made()
    await made.end(await made.begin())
    assert made.store.fingerprints == {}
    assert (await made.begin("f-2")).state is None


async def test_an_attempt_waits_for_the_one_before_it() -> None:
    made = Made()
    first = await made.begin()
    second = asyncio.create_task(made.begin())
    await asyncio.sleep(0)
    assert not second.done()
    await made.progress(first, step=1)
    await made.end(first)
    assert (await second).state == {"step": 1}


async def test_an_attempt_ends_once_its_work_is_done() -> None:
    made, stored = Made(), asyncio.Event()
    attempt = await made.begin()

    async def store() -> None:
        await stored.wait()
        await made.progress(attempt, step=1)

    attempt.tasks.start(store())
    made.idempotency.end(attempt)
    for _ in range(20):
        await asyncio.sleep(0)
    assert made.store.claimed == {REQUEST}
    stored.set()
    await made.tasks.join()
    assert made.store.claimed == set()
    assert (await made.begin()).state == {"step": 1}


async def test_the_wait_for_another_attempt_has_a_deadline() -> None:
    made = Made(timeout=0.01)
    await made.begin()
    with pytest.raises(DeadlineExceeded) as caught:
        await made.begin()
    assert caught.value.detail == (
        "The first request with this Idempotency-Key still runs after 0.01 s; try again."
    )
    assert caught.value.retry_after == 1


async def test_an_answer_that_cannot_be_kept_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    made = Made()
    attempt = await made.begin()
    await made.progress(attempt, step=1)
    made.store.full = DatabaseUnavailable("The disk is full.")
    await made.idempotency.keep(attempt, b"the answer")
    await made.end(attempt)
    assert caplog.messages == [
        "an answer is not kept for a retry: The disk is full.",
        "a request with an Idempotency-Key is not released: The disk is full.",
    ]
    made.store.full = None
    assert (await made.begin()).state == {"step": 1}


async def test_an_answer_that_is_too_large_is_not_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 4)
    made = Made()
    attempt = await made.begin()
    await made.progress(attempt, step=1)
    await made.idempotency.keep(attempt, b"12345")
    await made.end(attempt)
    assert caplog.messages == ["an answer of 5 bytes is too large to be kept for a retry"]
    attempt = await made.begin()
    assert attempt.state == {"step": 1}
    await made.idempotency.keep(attempt, b"1234")
    assert await made.idempotency.begin(REQUEST, "f-1") == b"1234"


async def test_a_client_that_disconnects_while_its_answer_is_kept_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, committed = Made(), asyncio.Event()
    commit = made.store.commit

    async def slow_commit(transaction: Transaction) -> None:
        await committed.wait()
        await commit(transaction)

    monkeypatch.setattr(made.store, "commit", slow_commit)
    attempt = await made.begin()
    keeping = asyncio.create_task(made.idempotency.keep(attempt, b"the answer"))
    await asyncio.sleep(0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    made.idempotency.end(attempt)
    committed.set()
    await until(lambda: made.store.requests)
    await made.tasks.join()
    assert await made.idempotency.begin(REQUEST, "f-1") == b"the answer"


async def test_nothing_is_kept_of_a_request_without_a_key() -> None:
    made = Made(timeout=7.0)
    attempt = made.idempotency.without_key()
    assert (attempt.request, attempt.state) == (None, None)
    assert 6.0 < attempt.deadline.remaining() <= 7.0
    assert attempt.progress({"step": 1}) is None
    await made.idempotency.keep(attempt, b"the answer")
    await made.end(attempt)
    assert (made.store.commits, made.store.requests, made.store.released) == ([], {}, [])


async def test_progress_is_json_text() -> None:
    attempt = await Made().begin()
    progress = attempt.progress({"score": 0.5, "text": "é"})
    assert isinstance(progress, Progress)
    assert (progress.request, progress.response) == (REQUEST, None)
    assert json.loads(progress.state or "") == {"score": 0.5, "text": "é"}


# Several machines


class Machines:
    """Two machines, each with a journal of its own, and what they share."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.records = FakeRecords()
        self.one, self.other = (Made(timeout, self.records) for _ in range(2))


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    return Machines()


async def test_an_answer_is_repeated_by_another_machine_and_kept_there(machines: Machines) -> None:
    attempt = await machines.one.begin()
    await machines.one.idempotency.keep(attempt, "the änswer".encode())
    await machines.one.end(attempt)
    assert machines.records.locked == set()
    for _ in range(2):
        again = await machines.other.idempotency.begin(REQUEST, "f-1")
        assert again == "the änswer".encode()
        # From then on, its own journal has it.
        machines.records.away = True
    assert machines.other.happened.of("metric") == [("replayed", None)] * 2
    assert (machines.other.store.claimed, machines.other.store.released) == (set(), [])


async def test_another_content_is_refused_by_another_machine(machines: Machines) -> None:
    first = await machines.one.begin()
    # Even while the first attempt runs.
    with pytest.raises(RequestKeyReused):
        await machines.other.begin("f-2")
    await machines.other.tasks.join()
    assert (machines.other.store.claimed, machines.other.store.fingerprints) == (set(), {})
    await machines.one.idempotency.keep(first, b"the answer")
    with pytest.raises(RequestKeyReused):
        await machines.other.begin("f-2")


async def test_an_attempt_waits_for_the_one_of_another_machine(machines: Machines) -> None:
    first = await machines.one.begin()
    second = asyncio.create_task(machines.other.begin())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not second.done()
    await machines.one.progress(first, step=1)
    await machines.one.end(first)
    resumed = await second
    # It continues from the durable state, with the id of the first attempt.
    assert (resumed.state, resumed.id, resumed.begun) == ({"step": 1}, first.id, first.begun)
    await machines.other.idempotency.keep(resumed, b"the answer")
    await machines.other.tasks.join()
    assert await machines.one.idempotency.begin(REQUEST, "f-1") == b"the answer"


async def test_a_later_state_of_another_machine_counts(machines: Machines) -> None:
    for made, step in ((machines.one, 1), (machines.other, 2)):
        attempt = await made.begin()
        await made.progress(attempt, step=step)
        await made.end(attempt)
    assert (await machines.one.begin()).state == {"step": 2}


async def test_a_failed_attempt_without_a_state_is_forgotten_by_all(machines: Machines) -> None:
    await machines.one.end(await machines.one.begin())
    assert (machines.records.records, machines.records.locked) == ({}, set())
    assert (await machines.other.begin("f-2")).state is None


async def test_the_wait_for_another_machine_has_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    machines = Machines(timeout=0.01)
    await machines.one.begin()
    with pytest.raises(DeadlineExceeded, match=r"still runs after 0\.01 s; try again"):
        await machines.other.begin()
    await machines.other.tasks.join()
    assert machines.other.store.claimed == set()


async def test_a_late_failure_does_not_forget_the_answer_of_another_machine(
    machines: Machines,
) -> None:
    late = await machines.one.begin()
    # The machine is suspended for longer than its lock lasts.
    machines.records.locked.clear()
    attempt = await machines.other.begin()
    await machines.other.idempotency.keep(attempt, b"the answer")
    await machines.one.end(late)
    assert await machines.one.idempotency.begin(REQUEST, "f-1") == b"the answer"


async def test_while_redis_is_away_the_journal_alone_decides(machines: Machines) -> None:
    machines.records.away = True
    attempt = await machines.one.begin()
    assert attempt.lock is None
    await machines.one.idempotency.keep(attempt, b"the answer")
    assert await machines.one.idempotency.begin(REQUEST, "f-1") == b"the answer"
    # Saved for the other machines, as soon as Redis is back.
    machines.records.away = False
    assert await machines.other.idempotency.begin(REQUEST, "f-1") == b"the answer"


async def test_a_lock_is_released_even_if_the_journal_fails(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: RequestKey) -> str:
        raise DatabaseUnavailable("The disk hangs.")

    attempt = await machines.one.begin()
    monkeypatch.setattr(machines.one.store, "request_state", fail)
    await machines.one.end(attempt)
    assert machines.records.locked == set()
    assert caplog.messages == ["a request with an Idempotency-Key is not released: The disk hangs."]


async def test_an_answer_that_this_journal_does_not_take_is_repeated_all_the_same(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    await machines.one.idempotency.keep(await machines.one.begin(), b"the answer")
    claim = machines.other.store.claim

    async def claim_and_fill(request: RequestKey, fingerprint: str) -> Claim:
        claimed = await claim(request, fingerprint)
        machines.other.store.full = DatabaseUnavailable("The disk is full.")
        return claimed

    machines.other.store.claim = claim_and_fill  # type: ignore[method-assign]
    assert await machines.other.idempotency.begin(REQUEST, "f-1") == b"the answer"
    assert caplog.messages[0] == "an answer is not kept for a retry: The disk is full."
