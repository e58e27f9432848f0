"""The database, on LanceDB in a folder."""

from __future__ import annotations

import asyncio
import datetime
import json
import multiprocessing
from collections.abc import AsyncIterator, Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import lancedb
import pytest
from pydantic import ValidationError

from llm_sidecar import db
from llm_sidecar.db import (
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    Store,
)
from llm_sidecar.errors import DatabaseUnavailable

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
FEEDBACK: dict[str, Any] = {
    "transaction_id": "t-1",
    "timestamp": NOW,
    "feedback_type": "rating",
    "feedback_content": "good",
}
RUN: dict[str, Any] = {
    "run_id": "r-1",
    "timestamp": NOW,
    "input_query": "Long ABC",
    "final_output": "{}",
    "status": "success",
}
PROPOSAL: dict[str, Any] = {
    "transaction_id": "r-1",
    "timestamp": NOW,
    "prompt": "Long ABC",
    "proposal": {"ticker": "ABC"},
    "assessment": "Fine.",
    "score": 0.5,
    "model": "phi3",
    "adapter": None,
    "latencies": {"proposal": 0.25, "assessment": 0.5, "score": None},
    "grounded": "ticker,rationale",
    "provenance": {"ticker": "ABC"},
}
HOSTILE = [
    "'; DROP TABLE phi3_feedback; --",
    'quotes " and \\ and \\x00',
    "🚀価格\u202e",
    "line\nbreak\r\n\ttab",
    "x" * 1_000_000,
]


def feedback(**changes: Any) -> Phi3FeedbackSchema:
    return Phi3FeedbackSchema(**FEEDBACK | changes)


def run(**changes: Any) -> OrchestratorRunSchema:
    return OrchestratorRunSchema(**RUN | changes)


def score(**changes: Any) -> HermesScoreSchema:
    values: dict[str, Any] = {"run_id": "r-1", "timestamp": NOW, "score": 0.5}
    return HermesScoreSchema(**values | changes)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "db")
    yield opened
    await opened.close()


async def test_a_row_is_read_as_it_was_written(store: Store) -> None:
    corrected = {"ticker": "ABC", "confidence": 0.5}
    await store.append(feedback(corrected_proposal=corrected))
    await store.append(run())
    await store.append(score(score=0.25))
    await store.append(ProposalSchema(**PROPOSAL))
    (stored,) = await store.last("phi3_feedback", 5)
    assert stored.pop("corrected_proposal") == '{"ticker":"ABC","confidence":0.5}'
    assert len(stored.pop("feedback_id")) == 64
    arrived = datetime.datetime.now(datetime.UTC) - stored.pop("received")
    assert datetime.timedelta() < arrived < datetime.timedelta(minutes=1)
    assert stored == FEEDBACK | {"schema_version": "1.0", "source": "direct", "author": None}
    assert await store.last("orchestrator_runs", 5) == [RUN | {"error_message": None}]
    (scored,) = await store.last("hermes_scores", 5)
    unknown = {"answer_mass": None, "score_reliable": None}
    assert scored == {
        "run_id": "r-1",
        "timestamp": NOW,
        "score": 0.25,
        "rationale": "",
        **unknown,
    }
    text = '{"ticker":"ABC"}'
    assert await store.last("proposals", 5) == [
        PROPOSAL | {"proposal": text, "provenance": text} | unknown
    ]


async def test_an_object_is_stored_as_json(store: Store) -> None:
    await store.append(feedback(feedback_content={"stars": 5}))
    (row,) = await store.last("phi3_feedback", 1)
    assert json.loads(row["feedback_content"]) == {"stars": 5}


@pytest.mark.parametrize("text", HOSTILE, ids=["sql", "quotes", "unicode", "lines", "megabyte"])
async def test_a_hostile_text_is_stored_and_found_as_it_was(store: Store, text: str) -> None:
    texts = {"run_id": text, "input_query": text, "final_output": text, "error_message": text}
    await store.append(run(**texts, status=text))
    await store.append(
        feedback(
            transaction_id=text, feedback_content=text, corrected_proposal={"why": text, text: 1}
        )
    )
    await store.append(score(run_id=text, rationale=text))
    texts = {"transaction_id": text, "prompt": text, "assessment": text, "model": text}
    await store.append(
        ProposalSchema(**PROPOSAL | texts | {"adapter": text, "proposal": {"why": text}})
    )
    await store.append(run())
    found = await store.transaction(text)
    assert found.pop("feedback_withdrawals") == []
    assert {table: len(rows) for table, rows in found.items()} == dict.fromkeys(found, 1)
    (row,) = found["orchestrator_runs"]
    assert row == RUN | {key: text for key in row if key != "timestamp"}
    (row,) = found["phi3_feedback"]
    assert json.loads(row["corrected_proposal"]) == {"why": text, text: 1}
    assert row["feedback_content"] == text
    feedback_id = row["feedback_id"]
    assert found["hermes_scores"][0]["rationale"] == text
    (row,) = found["proposals"]
    assert {name: row[name] for name in (*texts, "adapter")} == {**texts, "adapter": text}
    assert await store.last("orchestrator_runs", 0, status=text) == found["orchestrator_runs"]
    assert await store.recent_corrections(1) == [(text, {"why": text, text: 1}, text, feedback_id)]


async def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ValidationError):
        run(input_query="\ud800")


@pytest.mark.parametrize(
    "written",
    [
        NOW.replace(tzinfo=None),
        NOW.astimezone(datetime.timezone(datetime.timedelta(hours=5))),
        "2026-01-02T03:04:05.678901",
        "2026-01-02T05:04:05.678901+02:00",
    ],
)
async def test_every_timestamp_is_kept_as_utc(store: Store, written: Any) -> None:
    await store.append(run(timestamp=written))
    (row,) = await store.last("orchestrator_runs", 1)
    assert row["timestamp"] == NOW


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
def test_the_default_timestamp_is_now(given: dict[str, Any]) -> None:
    before = datetime.datetime.now(datetime.UTC)
    made = HermesScoreSchema(run_id="r", score=1.0, **given).timestamp
    assert before <= made <= datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize(
    "changes",
    [
        {"feedback_type": "shout"},
        {"transaction_id": ""},
        {"timestamp": "noon"},
        {"timestamp": "20260131"},
        {"timestamp": 1769817600},
        {"timestamp": "0001-01-01T00:00:00+05:00"},
        {"timestamp": datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)},
        {"received": NOW},
        {"source": "direct"},
        {"feedback_content": 3},
        {"feedback_content": {"when": NOW}},
        {"corrected_proposal": {"confidence": float("nan")}},
        {"other": 1},
    ],
)
def test_an_invalid_dict_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        feedback(**changes)


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_outside_0_to_1_is_refused(score: float) -> None:
    with pytest.raises(ValidationError):
        HermesScoreSchema(run_id="r", score=score)


async def test_the_last_rows_come_newest_first(store: Store) -> None:
    for minute in (3, 1, 2):
        when = NOW + datetime.timedelta(minutes=minute)
        await store.append(run(run_id=str(minute), timestamp=when))
    assert [row["run_id"] for row in await store.last("orchestrator_runs", 2)] == ["3", "2"]
    assert [row["run_id"] for row in await store.last("orchestrator_runs", 0)] == ["3", "2", "1"]


async def test_many_concurrent_callers_lose_no_row(store: Store) -> None:
    rows = [HermesScoreSchema(run_id=str(number), score=0.5) for number in range(200)]
    await asyncio.gather(*map(store.append, rows))
    found = await store.last("hermes_scores", 0)
    assert sorted(int(row["run_id"]) for row in found) == list(range(200))


async def test_feedback_that_is_delivered_twice_is_stored_once(
    store: Store, tmp_path: Path
) -> None:
    await asyncio.gather(*(store.append(feedback()) for _ in range(3)))
    await store.append(feedback())
    other_process = await Store.open(tmp_path / "db")
    await other_process.append(feedback())
    await other_process.append(feedback(feedback_type="human_edit"))
    await other_process.close()
    rows = await store.last("phi3_feedback", 0)
    assert sorted(row["feedback_type"] for row in rows) == ["human_edit", "rating"]


def run_processes(work: Callable[..., None], folder: Path, count: int = 3) -> list[int | None]:
    """Runs `work(folder, number, barrier)` in several processes; returns their exit codes."""
    # The processes are forked from a server that imports lancedb once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier = context.Barrier(count)
    processes = [
        context.Process(target=work, args=(folder, number, barrier)) for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _append_the_same(folder: Path, number: int, barrier: Barrier) -> None:
    async def append() -> None:
        store = await Store.open(folder)
        for turn in range(10):
            barrier.wait(30)
            # Each process sets its own time, as sidecars do for events without one.
            when = NOW + datetime.timedelta(seconds=number)
            await store.append(feedback(timestamp=when, feedback_id=f"published-{turn}"))
        await store.close()

    asyncio.run(append())


async def test_processes_that_store_the_same_feedback_at_once_store_it_once(tmp_path: Path) -> None:
    await (await Store.open(tmp_path)).close()
    assert await asyncio.to_thread(run_processes, _append_the_same, tmp_path) == [0, 0, 0]
    store = await Store.open(tmp_path)
    rows = await store.last("phi3_feedback", 0)
    await store.close()
    assert sorted(row["feedback_id"] for row in rows) == [f"published-{n}" for n in range(10)]


async def test_different_feedback_of_the_same_second_is_stored_twice(store: Store) -> None:
    for content in ("the stop is too tight", "so is the target"):
        await store.append(feedback(feedback_content=content))
    assert len(await store.last("phi3_feedback", 0)) == 2


async def test_the_mean_score_covers_the_given_time(store: Store) -> None:
    assert await store.mean_score_since(NOW) == (None, 0)
    for hours, value in ((-30, 0.0), (-23, 0.2), (0, 0.6)):
        await store.append(score(timestamp=NOW + datetime.timedelta(hours=hours), score=value))
    mean, number = await store.mean_score_since(NOW - datetime.timedelta(hours=24))
    assert mean == pytest.approx(0.4)
    assert number == 2


async def test_the_mean_score_leaves_out_unreliable_scores(store: Store) -> None:
    await store.append(score(score=1.0, answer_mass=0.1, score_reliable=False))
    assert await store.mean_score_since(NOW) == (None, 0)
    # The mass of a score by an older version is unknown; it counts.
    await store.append(score(score=0.25))
    await store.append(score(score=0.5, answer_mass=0.9, score_reliable=True))
    assert await store.mean_score_since(NOW) == (0.375, 2)
    newest = await store.last("hermes_scores", 0)
    assert {(row["score"], row["answer_mass"], row["score_reliable"]) for row in newest} == {
        (1.0, 0.1, False),
        (0.25, None, None),
        (0.5, 0.9, True),
    }


async def test_corrections_are_in_order_of_arrival_with_their_prompts(
    store: Store,
) -> None:
    for number in range(3):
        name = f"t-{number}"
        await store.append(run(run_id=name, input_query=f"prompt {number}"))
        # The first has the latest timestamp.
        when = NOW - datetime.timedelta(minutes=number)
        await store.append(
            feedback(
                transaction_id=name,
                timestamp=when,
                corrected_proposal={"n": number},
                feedback_id=f"f-{number}",
            )
        )
    await store.append(feedback(transaction_id="t-1"))
    await store.append(feedback(transaction_id="unknown", corrected_proposal={"n": 9}))
    earlier = NOW - datetime.timedelta(hours=1)
    await store.append(
        feedback(
            transaction_id="t-0",
            timestamp=earlier,
            corrected_proposal={"n": 10},
            feedback_id="f-10",
        )
    )
    assert await store.recent_corrections(2) == [
        ("prompt 0", {"n": 10}, "t-0", "f-10"),
        ("prompt 2", {"n": 2}, "t-2", "f-2"),
    ]


async def test_usable_corrections_are_found_behind_many_unusable_ones(store: Store) -> None:
    await store.append(run(run_id="t"))
    for number in range(2):
        await store.append(
            feedback(
                transaction_id="t", corrected_proposal={"usable": number}, feedback_id=f"f-{number}"
            )
        )
    others = (
        feedback(transaction_id="t", corrected_proposal={"n": n}, feedback_id=f"n-{n}")
        for n in range(300)
    )
    await asyncio.gather(*map(store.append, others))
    found = await store.recent_corrections(3, lambda correction: "usable" in correction.proposal)
    assert found == [("Long ABC", {"usable": 1}, "t", "f-1")]


async def test_corrections_and_prompts_that_are_too_long_are_not_read(store: Store) -> None:
    for name, prompt, proposal in (
        ("short", "p" * 10, {"n": 1}),
        ("long-prompt", "p" * 11, {"n": 1}),
        ("long-proposal", "p", {"n": "1234"}),
    ):
        await store.append(run(run_id=name, input_query=prompt))
        await store.append(feedback(transaction_id=name, corrected_proposal=proposal))
    found = await store.recent_corrections(3, proposal_bytes=7, prompt_bytes=10)
    assert [correction.transaction_id for correction in found] == ["short"]


async def test_corrections_that_differ_only_in_the_proposal_are_two_rows(store: Store) -> None:
    for number in range(2):
        await store.append(feedback(corrected_proposal={"n": number}))
    rows = await store.last("phi3_feedback", 0)
    assert sorted(row["corrected_proposal"] for row in rows) == ['{"n":0}', '{"n":1}']


async def test_the_newest_rows_of_a_large_table_are_found_at_any_age(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_sidecar.db.queries._SMALL", 10)
    ages = [datetime.timedelta(minutes=1) * 3**power for power in range(14)]
    for number, age in enumerate(ages):
        when = datetime.datetime.now(datetime.UTC) - age
        status = "error" if number % 2 else "success"
        await store.append(run(run_id=str(number), timestamp=when, status=status))
    for count in (1, 5, 14, 20):
        rows = await store.last("orchestrator_runs", count)
        assert [row["run_id"] for row in rows] == [str(n) for n in range(14)][:count]
    rows = await store.last("orchestrator_runs", 2, status="error")
    assert [row["run_id"] for row in rows] == ["1", "3"]
    since = datetime.datetime.now(datetime.UTC) - ages[3]
    rows = await store.last("orchestrator_runs", 9, since=since)
    assert [row["run_id"] for row in rows] == ["0", "1", "2"]


async def test_closing_moves_the_logged_rows(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "db")
    writing = [asyncio.create_task(store.append(run(run_id=str(n)))) for n in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*writing)
    with pytest.raises(DatabaseUnavailable, match="closed"):
        await store.append(run())
    store = await Store.open(tmp_path / "db")
    assert len(await store.last("orchestrator_runs", 0)) == 20
    await store.close()


async def test_a_hundred_rows_are_written_in_less_than_a_hundred_commits(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await asyncio.gather(*(store.append(score(run_id=str(number))) for number in range(100)))
    await store.close()
    table = await (await lancedb.connect_async(tmp_path)).open_table("hermes_scores")
    rows = await table.query().to_list()
    assert sorted(int(row["run_id"]) for row in rows) == list(range(100))
    # A commit creates a version, and recent versions are kept.
    assert len(await table.list_versions()) < 20


# Synchronous functions


def test_a_model_that_is_stored_again_is_one_row(tmp_path: Path) -> None:
    uri, row = str(tmp_path / "db"), run()
    for _ in range(2):
        db.log_run(row, uri=uri)
    db.log_run(run(), uri=uri)

    async def count() -> int:
        store = await Store.open(uri)
        found = len(await store.last("orchestrator_runs", 0))
        await store.close()
        return found

    assert asyncio.run(count()) == 2


def test_synchronous_functions_accept_models_and_dicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    db.init_db()
    db.append_feedback(Phi3FeedbackSchema(**FEEDBACK))
    db.append_feedback(FEEDBACK)
    db.log_run(RUN)
    db.log_hermes_score({"run_id": "r-1", "score": 0.5})

    async def counts() -> list[int]:
        store = await Store.open(tmp_path / "db")
        found = [len(await store.last(table, 0)) for table in db.TABLES]
        await store.close()
        return found

    assert asyncio.run(counts()) == [1, 1, 1, 0, 0]
