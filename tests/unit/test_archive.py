"""What the archive keeps in memory: the few-shot examples, and the mean of the scores."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import archive as module
from llm_sidecar.archive import Archive
from llm_sidecar.db import HermesScoreSchema, OrchestratorRunSchema, Phi3FeedbackSchema
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.proposals import Example

RUN = OrchestratorRunSchema(run_id="t-1", input_query="x", final_output="", status="error")
SCORE = HermesScoreSchema(run_id="t-1", score=0.5)


def proposal(name: str) -> dict[str, Any]:
    return {"ticker": name, "action": "pass", "confidence": 0.5, "rationale": "It holds."}


def example(name: str) -> Example:
    return Example(f"prompt of {name}", proposal(name))


def correction(name: str, **changes: Any) -> tuple[str, dict[str, Any], str]:
    """As the store gives it: prompt, proposal, transaction_id."""
    prompt, corrected = changes.get("prompt", f"prompt of {name}"), proposal(name)
    return prompt, corrected | changes.get("proposal", {}), f"t-{name}"


def feedback(name: str, corrected: dict[str, Any] | None = None) -> Phi3FeedbackSchema:
    return Phi3FeedbackSchema(
        transaction_id=f"t-{name}",
        feedback_type="correction",
        feedback_content="no",
        corrected_proposal=corrected,
    )


class FakeStore:
    """A database in memory, which answers what a test puts into it.

    Attributes:
        rows: that were appended.
        corrections: newest first.
        mean: of the scores, and their number.
        since: from when on scores were asked for.
        asked: how many corrections were asked for, each time.
        patience: seconds for which it was waited for, each time.
        failure: raised by whatever is asked.
        is_away: whether it is not open.
    """

    def __init__(self, uri: str, **options: Any) -> None:
        self.options = {"uri": uri, **options}
        self.rows: list[Any] = []
        self.corrections: list[tuple[str, dict[str, Any], str]] = []
        self.mean: tuple[float | None, int] = (None, 0)
        self.since: list[datetime.datetime] = []
        self.asked: list[int] = []
        self.patience: list[float] = []
        self.failure: Exception | None = None
        self.is_away = False
        self.is_full = False
        self.started = self.closed = False
        self.log_folder = Path("/log")

    def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True

    async def opened(self, timeout: float) -> None:
        self.patience.append(timeout)
        self._fail()

    def is_open(self) -> bool:
        return not self.is_away

    def has_room(self) -> bool:
        return not self.is_full

    def status(self) -> dict[str, Any]:
        return {"state": "fake"}

    async def append(self, row: Any) -> None:
        if self.is_full:
            raise DatabaseUnavailable("The disk is full.")
        self.rows.append(row)

    async def recent_corrections(self, count: int) -> list[tuple[str, dict[str, Any], str]]:
        self.asked.append(count)
        self._fail()
        return self.corrections[:count]

    async def mean_score_since(self, since: datetime.datetime) -> tuple[float | None, int]:
        self.since.append(since)
        self._fail()
        return self.mean

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class Made:
    """An archive over a fake store.

    Attributes:
        changes: how often it has said that the examples changed.
    """

    def __init__(self, examples: int = 3) -> None:
        self.changes = 0
        self.archive = Archive(
            "memory", log_dir=Path("/log"), examples=examples, on_examples=self._changed
        )
        self.store: FakeStore = self.archive._store  # type: ignore[assignment]

    def _changed(self) -> None:
        self.changes += 1


@pytest.fixture(autouse=True)
def fake_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Store", FakeStore)
    for name in ("_REFRESH_PAUSE", "_RETRY_PAUSE"):
        monkeypatch.setattr(module, name, 0.0)


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.archive.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


# Examples


async def test_the_examples_are_the_newest_corrections_oldest_first(made: Made) -> None:
    made.store.corrections = [correction(name) for name in ("D", "C", "B", "A")]
    await made.archive.append_feedback(feedback("D", proposal("D")))
    assert made.archive.examples == (example("B"), example("C"), example("D"))
    assert made.changes == 1
    # More than are needed, as some cannot be one.
    assert made.store.asked == [12]


async def test_examples_that_stay_the_same_are_no_change(made: Made) -> None:
    made.store.corrections = [correction("A")]
    for _ in range(2):
        await made.archive.append_feedback(feedback("A", proposal("A")))
    assert made.changes == 1
    made.store.corrections = []
    await made.archive.append_feedback(feedback("A", proposal("A")))
    assert (made.changes, made.archive.examples) == (2, ())


async def test_what_cannot_be_an_example_leaves_its_place_to_an_older_one(made: Made) -> None:
    made.store.corrections = [
        correction("F", proposal={"action": "buy"}),
        correction("E", prompt="x" * 2001),
        correction("D", prompt="x" * 2000),
        correction("C"),
        correction("B"),
        correction("A"),
    ]
    await made.archive.append_feedback(feedback("D", proposal("D")))
    longest = Example("x" * 2000, proposal("D"))
    assert made.archive.examples == (example("B"), example("C"), longest)


async def test_a_correction_is_said_to_be_an_example_where_it_is_one(made: Made) -> None:
    made.store.corrections = [correction("A")]
    assert await made.archive.append_feedback(feedback("A", proposal("A"))) is True
    # Another correction of the same run is the one in use.
    assert await made.archive.append_feedback(feedback("A", proposal("Z"))) is False
    assert await made.archive.append_feedback(feedback("B", proposal("A"))) is False
    assert len(made.store.rows) == 3


async def test_feedback_without_a_correction_asks_for_no_examples(made: Made) -> None:
    given = feedback("A")
    assert await made.archive.append_feedback(given) is False
    assert (made.store.rows, made.store.asked) == ([given], [])


async def test_whether_it_is_an_example_is_not_known_while_the_database_is_away(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.store.is_away = True
    given = feedback("A", proposal("A"))
    assert await made.archive.append_feedback(given) is None
    assert (made.store.rows, made.store.asked, caplog.messages) == ([given], [], [])
    made.store.is_away, made.store.failure = False, DatabaseUnavailable("It cannot be read.")
    assert await made.archive.append_feedback(given) is None
    assert caplog.messages == ["the examples are not refreshed: It cannot be read."]
    assert made.changes == 0


async def test_feedback_that_is_not_stored_is_an_error(made: Made) -> None:
    made.store.is_full = True
    with pytest.raises(DatabaseUnavailable, match="The disk is full"):
        await made.archive.append_feedback(feedback("A", proposal("A")))
    assert made.store.asked == []
    assert made.archive.available() is False


async def test_examples_that_are_switched_off_are_never_read() -> None:
    made = Made(examples=0)
    made.store.corrections = [correction("A")]
    assert await made.archive.append_feedback(feedback("A", proposal("A"))) is False
    assert (made.store.asked, made.archive.examples) == ([], ())


# What is kept fresh


async def test_examples_and_scores_are_there_soon_after_the_start(made: Made) -> None:
    made.store.corrections = [correction("A")]
    made.store.mean = (0.25, 4)
    assert (made.archive.mean_score, made.archive.num_scores) == (None, 0)
    before = datetime.datetime.now(datetime.UTC)
    made.archive.start()
    await until(lambda: made.archive.num_scores)
    assert made.store.started
    assert (made.archive.mean_score, made.archive.num_scores) == (0.25, 4)
    assert made.archive.examples == (example("A"),)
    day = datetime.timedelta(hours=24)
    assert before - day <= made.store.since[0] <= datetime.datetime.now(datetime.UTC) - day


async def test_what_other_processes_write_is_there_after_half_a_minute(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: float = module._REFRESH_SECONDS
    assert seconds == 30.0
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.01)
    made.archive.start()
    await until(lambda: made.store.since)
    made.store.mean = (0.5, 1)
    await until(lambda: made.archive.num_scores == 1)
    assert set(made.store.patience) == {0.01}


async def test_a_score_is_counted_at_once_and_another_row_is_not(made: Made) -> None:
    made.archive.start()
    await until(lambda: made.store.since)
    await made.archive.append(RUN)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(made.store.since) == 1
    made.store.mean = (0.5, 1)
    await made.archive.append(SCORE)
    await until(lambda: made.archive.num_scores == 1)
    assert made.archive.mean_score == 0.5
    assert made.store.rows == [RUN, SCORE]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            DatabaseUnavailable("It is away."),
            "what is kept in memory is not refreshed: It is away.",
        ),
        (ValueError("odd"), "what is kept in memory is not refreshed"),
    ],
)
async def test_a_database_that_comes_back_is_read_again(
    made: Made, caplog: pytest.LogCaptureFixture, failure: Exception, said: str
) -> None:
    made.store.failure = failure
    made.store.mean = (0.5, 1)
    made.archive.start()
    await until(lambda: caplog.messages)
    made.store.failure = None
    await until(lambda: made.archive.num_scores)
    assert set(caplog.messages) == {said}


async def test_the_same_failure_is_said_once(
    made: Made, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [DatabaseUnavailable(reason) for reason in ("one", "one", "other", "one")]

    async def opened(timeout: float) -> None:
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr(made.store, "opened", opened)
    made.store.mean = (0.5, 1)
    made.archive.start()
    await until(lambda: made.archive.num_scores)
    assert [message.rpartition(": ")[2] for message in caplog.messages] == ["one", "other", "one"]


async def test_a_row_that_cannot_be_stored_is_an_error(made: Made) -> None:
    made.store.is_full = True
    with pytest.raises(DatabaseUnavailable, match="The disk is full"):
        await made.archive.append(RUN)


# The store's own


async def test_the_store_is_opened_and_closed_with_the_archive() -> None:
    made = Made()
    assert made.store.options == {"uri": "memory", "log_dir": Path("/log")}
    await made.archive.close()
    assert not made.store.closed
    made.archive.start()
    await made.archive.close()
    assert made.store.closed


async def test_its_state_is_the_stores(made: Made) -> None:
    assert made.archive.status() == {"state": "fake"}
    assert made.archive.log_folder == Path("/log")
    assert (made.archive.available(), made.archive.is_whole()) == (True, True)
    made.store.is_away = True
    assert (made.archive.available(), made.archive.is_whole()) == (True, False)
