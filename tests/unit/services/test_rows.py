"""Rows: stored or counted as lost, and the mean of the last day's scores."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator

import pytest

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.db import HermesScoreSchema, OrchestratorRunSchema
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.services import refresh
from llm_sidecar.services.rows import Rows
from tests.unit.fakes import FakeBus, FakeMetrics, FakeStore, Happened, until

RUN = OrchestratorRunSchema(run_id="t-1", input_query="x", final_output="", status="error")
SCORE = HermesScoreSchema(run_id="t-1", score=0.5)


class Made:
    """Rows over a fake store."""

    def __init__(self) -> None:
        self.happened = Happened()
        self.store = FakeStore(self.happened)
        bus = FakeBus(self.happened)
        self.rows = Rows(self.store.store, bus.bus, FakeMetrics(self.happened))


@pytest.fixture
async def made(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    for name in ("_PAUSE", "_RETRY_PAUSE"):
        monkeypatch.setattr(refresh, name, 0.0)
    made = Made()
    yield made
    await made.rows.close()


EVENT = CloudEvent("phi3.adapter.swapped", "{}", "/osiris/llm-sidecar", "x")


async def test_a_transaction_becomes_durable_as_a_whole(made: Made) -> None:
    transaction = Transaction([RUN, SCORE], [EVENT])
    assert await made.rows.commit(transaction) is True
    assert made.store.commits == [transaction]
    assert made.happened.of("metric") == []


async def test_rows_that_are_lost_are_logged_and_counted(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.store.full = DatabaseUnavailable("The disk is full.")
    assert await made.rows.commit(Transaction([RUN, SCORE])) is False
    assert caplog.messages == [
        "a row of orchestrator_runs is not stored: The disk is full.",
        "a row of hermes_scores is not stored: The disk is full.",
    ]
    assert made.happened.log == [
        ("metric", "row_lost", "orchestrator_runs"),
        ("metric", "row_lost", "hermes_scores"),
    ]


async def test_an_event_that_is_not_durable_waits_in_memory(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.store.full = DatabaseUnavailable("The disk is full.")
    assert (
        await made.rows.commit(Transaction([RUN], [EVENT], draft="t-1"), preliminary=True) is False
    )
    assert caplog.messages == ["phi3.adapter.swapped is not durable: The disk is full."]
    # The row is not lost, because another one follows.
    assert made.happened.log == [("event", "phi3.adapter.swapped", {})]


async def test_the_mean_score_is_there_soon_after_the_start(made: Made) -> None:
    made.store.mean = (0.25, 4)
    assert (made.rows.mean_score, made.rows.num_scores) == (None, 0)
    before = datetime.datetime.now(datetime.UTC)
    made.rows.start()
    await until(lambda: made.rows.num_scores)
    assert (made.rows.mean_score, made.rows.num_scores) == (0.25, 4)
    day = datetime.timedelta(hours=24)
    assert before - day <= made.store.since[0] <= datetime.datetime.now(datetime.UTC) - day
    assert made.store.timeouts == [30.0]


async def test_a_score_is_counted_at_once_and_another_row_is_not(made: Made) -> None:
    made.rows.start()
    await until(lambda: made.store.since)
    await made.rows.commit(Transaction([RUN]))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(made.store.since) == 1
    made.store.mean = (0.5, 1)
    await made.rows.commit(Transaction([SCORE]))
    await until(lambda: made.rows.num_scores == 1)
    assert made.rows.mean_score == 0.5


async def test_a_database_that_comes_back_is_read_again(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.store.failure, made.store.mean = DatabaseUnavailable("It is away."), (0.5, 1)
    made.rows.start()
    await until(lambda: caplog.messages)
    made.store.failure = None
    await until(lambda: made.rows.num_scores)
    assert set(caplog.messages) == {"the mean score cannot be refreshed: It is away."}
