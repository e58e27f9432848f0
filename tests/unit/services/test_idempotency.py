"""Requests with an `Idempotency-Key`: one attempt at a time, and kept answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llm_sidecar.db.transaction import Progress, RequestKey, Transaction
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded, RequestKeyReused
from llm_sidecar.services import idempotency as module
from llm_sidecar.services.idempotency import Attempt, Idempotency
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeMetrics, FakeStore, Happened, until

REQUEST = RequestKey("desk", "k-1")


class Made:
    """The service over a fake store."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.happened = Happened()
        self.store = FakeStore(self.happened)
        self.tasks = TaskSet()
        metrics = FakeMetrics(self.happened)
        self.idempotency = Idempotency(self.store.store, self.tasks, metrics, timeout=timeout)

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
