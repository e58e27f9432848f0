"""What the archive keeps in memory: the few-shot examples, and the mean of the scores."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from llm_sidecar.services.archive import Archive
from llm_sidecar.services.examples import Outcome

from llm_sidecar.db import (
    Correction,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    PublishedFeedback,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.proposals import Example
from llm_sidecar.services import archive as module

RUN = OrchestratorRunSchema(run_id="t-1", input_query="x", final_output="", status="error")
SCORE = HermesScoreSchema(run_id="t-1", score=0.5)
AWAY = DatabaseUnavailable("It cannot be read.")


def proposal(name: str) -> dict[str, Any]:
    return {"ticker": name, "action": "pass", "confidence": 0.5, "rationale": "It holds."}


def correction(name: str, prompt: str = "") -> Correction:
    """The one with the feedback_id f-NAME, of the run t-NAME."""
    return Correction(prompt or f"prompt of {name}", proposal(name), f"t-{name}", f"f-{name}")


def feedback(name: str, **changes: Any) -> Phi3FeedbackSchema:
    """What a person sent for `correction(name)`."""
    values: dict[str, Any] = {
        "feedback_id": f"f-{name}",
        "transaction_id": f"t-{name}",
        "feedback_type": "correction",
        "feedback_content": "no",
        "corrected_proposal": proposal(name),
    }
    return Phi3FeedbackSchema(**values | changes)


class FakeStore:
    """A database in memory, which answers what a test puts into it.

    Attributes:
        rows: that were appended.
        corrections: newest first.
        prompts: of the runs, by transaction_id.
        withdrawn: feedback that is.
        transactions: of feedback that is stored, by feedback_id.
        mean: of the scores, and their number.
        since: from when on scores were asked for.
        patience: seconds for which it was waited for, each time.
        asked: with which options corrections were asked for.
        failure: raised by whatever is asked.
        reading: unless it is set, corrections do not come.
        is_away, is_full: whether it is not open, and whether it takes no rows.
    """

    def __init__(self, uri: str, **options: Any) -> None:
        self.options = {"uri": uri, **options}
        self.rows: list[Any] = []
        self.corrections: list[Correction] = []
        self.prompts: dict[str, str] = {}
        self.withdrawn: set[str] = set()
        self.transactions: dict[str, str] = {}
        self.mean: tuple[float | None, int] = (None, 0)
        self.since: list[datetime.datetime] = []
        self.patience: list[float] = []
        self.asked: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.reading = asyncio.Event()
        self.reading.set()
        self.is_away = self.is_full = False
        self.started = self.closed = False
        self.log_folder = Path("/log")
        self.database_id: str | None = None

    def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True

    async def opened(self, timeout: float) -> None:
        self.patience.append(timeout)
        self._fail()

    def is_open(self) -> bool:
        return not self.is_away

    def refusal(self) -> str | None:
        return "The disk is full." if self.is_full else None

    def status(self) -> dict[str, Any]:
        return {"state": "fake"}

    async def append(self, row: Any) -> None:
        if self.is_full:
            raise DatabaseUnavailable("The disk is full.")
        self.rows.append(row)

    async def recent_corrections(
        self, count: int, usable: Callable[[Correction], bool], **options: Any
    ) -> list[Correction]:
        self.asked.append({"count": count, **options})
        await self.reading.wait()
        self._fail()
        return [one for one in self.corrections if usable(one)][:count]

    async def prompt(self, run_id: str) -> str | None:
        return self.prompts.get(run_id)

    async def is_withdrawn(self, feedback_id: str) -> bool:
        return feedback_id in self.withdrawn

    async def feedback_transaction(self, feedback_id: str) -> str | None:
        self._fail()
        return self.transactions.get(feedback_id)

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

    def __init__(self, examples: int = 3, context: int = 100_000, **options: Any) -> None:
        self.changes = 0
        self.archive = Archive(
            "memory",
            log_dir=Path("/log"),
            examples=examples,
            context_length=lambda: context,
            on_examples=self._changed,
            **options,
        )
        self.store: FakeStore = self.archive._store  # type: ignore[assignment]

    def _changed(self) -> None:
        self.changes += 1

    async def correct(self, name: str, **changes: Any) -> Outcome:
        """Sends a correction."""
        return await self.archive.append_feedback(feedback(name, **changes))

    @property
    def used(self) -> list[str]:
        """The examples in use."""
        return [correction.feedback_id for correction in self.archive.corrections]


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
    assert await made.correct("D") is Outcome.EXAMPLE
    assert made.archive.corrections == tuple(correction(name) for name in ("B", "C", "D"))
    assert made.archive.examples == tuple(
        Example(f"prompt of {name}", proposal(name)) for name in ("B", "C", "D")
    )
    assert made.changes == 1


async def test_only_what_can_be_an_example_is_read(made: Made) -> None:
    made.store.corrections = [correction("C"), correction("B", prompt="x" * 2001), correction("A")]
    await made.correct("C")
    assert made.used == ["f-A", "f-C"]
    bounds = {"proposal_bytes": 500, "prompt_bytes": 3000}
    assert made.store.asked == [{"count": 3, "from_bus": False, **bounds}]
    heard = Made(examples=2, examples_from_bus=True)
    await heard.correct("A")
    assert heard.store.asked == [{"count": 2, "from_bus": True, **bounds}]


async def test_they_take_at_most_half_of_the_context() -> None:
    made = Made(context=2 * 300)
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    assert made.used == ["f-A", "f-B"]
    made = Made(context=2 * 200)
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    assert made.used == ["f-B"]
    # Alone it would be too much.
    made = Made(context=2 * 100)
    made.store.corrections = [correction("B"), correction("A")]
    made.store.prompts = {"t-B": "prompt of B"}
    assert await made.correct("B") is Outcome.TOO_MANY_TOKENS
    assert made.used == []


async def test_examples_that_stay_the_same_are_no_change(made: Made) -> None:
    made.store.corrections = [correction("A")]
    for _ in range(2):
        await made.correct("A")
    assert made.changes == 1
    made.store.corrections = []
    await made.correct("A")
    assert (made.changes, made.used) == (2, [])


async def test_examples_that_are_switched_off_are_never_read() -> None:
    made = Made(examples=0)
    made.store.corrections = [correction("A")]
    assert await made.correct("A") is Outcome.OFF
    assert (made.store.asked, made.used) == ([], [])


async def test_many_corrections_at_once_are_read_together(made: Made) -> None:
    made.store.corrections = [correction("A")]
    made.store.reading.clear()
    first = asyncio.create_task(made.correct("A"))
    await until(lambda: made.store.asked)
    others = [asyncio.create_task(made.correct("A")) for _ in range(9)]
    for _ in range(20):
        await asyncio.sleep(0)
    made.store.reading.set()
    assert set(await asyncio.gather(first, *others)) == {Outcome.EXAMPLE}
    # One reading for the first, and one that began after the last of the others came.
    assert len(made.store.asked) == 2


async def test_reading_them_has_a_deadline(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds: float = module._REFRESH_DEADLINE
    assert seconds == 8.0
    made.store.reading.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_REFRESH_DEADLINE", 0.01)
        assert await made.correct("A") is Outcome.DATABASE_AWAY
    assert caplog.messages == [
        "the examples are not refreshed: The examples could not be read within 0.01 s."
    ]
    made.store.reading.set()
    made.store.corrections = [correction("A")]
    assert await made.correct("A") is Outcome.EXAMPLE


# What is said of a correction


async def test_feedback_without_a_correction_asks_for_no_examples(made: Made) -> None:
    assert await made.correct("A", corrected_proposal=None) is Outcome.NO_CORRECTION
    assert [row.feedback_id for row in made.store.rows] == ["f-A"]
    assert made.store.asked == []


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"action": "hold"}, Outcome.INVALID),
        ({"rationale": "x" * 500}, Outcome.PROPOSAL_TOO_LONG),
    ],
)
async def test_a_correction_that_cannot_be_an_example_is_stored_with_the_reason(
    made: Made, changes: dict[str, Any], outcome: Outcome
) -> None:
    assert await made.correct("A", corrected_proposal=proposal("A") | changes) is outcome
    assert len(made.store.rows) == 1
    assert made.store.asked == []


async def test_each_reason_is_the_true_one(made: Made) -> None:
    assert await made.correct("A") is Outcome.NO_RUN
    made.store.prompts = {"t-A": "x" * 2001}
    assert await made.correct("A") is Outcome.PROMPT_TOO_LONG
    made.store.prompts = {"t-A": "prompt of A"}
    made.store.withdrawn = {"f-A"}
    assert await made.correct("A") is Outcome.WITHDRAWN
    made.store.withdrawn = {"f-B"}
    assert await made.correct("A") is Outcome.CROWDED_OUT
    # The newer correction of the same run.
    made.store.corrections = [correction("A")._replace(feedback_id="f-Z")]
    assert await made.correct("A") is Outcome.REPLACED
    made.store.corrections = [correction("A")]
    assert await made.correct("A") is Outcome.EXAMPLE


async def test_whether_it_is_an_example_is_unknown_while_the_database_is_away(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.store.is_away = True
    assert await made.correct("A") is Outcome.DATABASE_AWAY
    assert (len(made.store.rows), made.store.asked, caplog.messages) == (1, [], [])
    made.store.is_away, made.store.failure = False, AWAY
    assert await made.correct("A") is Outcome.DATABASE_AWAY
    assert caplog.messages == ["the examples are not refreshed: It cannot be read."]
    assert made.changes == 0


async def test_what_was_not_known_is_read_once_the_database_is_back(made: Made) -> None:
    made.archive.start()
    await until(lambda: made.store.since)
    made.store.failure, made.store.corrections = AWAY, [correction("A")]
    await made.correct("A")
    made.store.failure = None
    await until(lambda: made.used == ["f-A"])


async def test_feedback_that_is_not_stored_is_an_error(made: Made) -> None:
    made.store.is_full = True
    with pytest.raises(DatabaseUnavailable, match="The disk is full"):
        await made.correct("A")
    assert made.store.asked == []
    assert made.archive.refusal() == "The disk is full."


# Feedback that another service publishes


@pytest.mark.parametrize("counts", [False, True])
async def test_what_others_publish_is_stored_and_read_again_where_it_counts(
    counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(examples_from_bus=counts)
    refreshed: list[bool] = []
    given = PublishedFeedback(transaction_id="t-A", feedback_type="rating", feedback_content="good")
    monkeypatch.setattr(made.archive, "refresh_soon", lambda: refreshed.append(True))
    await made.archive.append_published(given)
    assert made.store.rows == [given]
    assert refreshed == [True] * counts


async def test_what_others_publish_and_cannot_be_stored_is_an_error(made: Made) -> None:
    made.store.is_full = True
    with pytest.raises(DatabaseUnavailable, match="The disk is full"):
        await made.archive.append_published(
            PublishedFeedback(transaction_id="t", feedback_type="rating", feedback_content="good")
        )


# Withdrawing


async def test_another_correction_replaces_a_withdrawn_example(made: Made) -> None:
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    made.store.corrections = [correction("A"), correction("0")]
    assert await made.archive.withdraw("f-B") is True
    assert made.used == ["f-0", "f-A"]
    row = made.store.rows[-1]
    assert isinstance(row, FeedbackWithdrawalSchema)
    assert (row.feedback_id, row.transaction_id) == ("f-B", "t-B")


async def test_other_feedback_is_withdrawn_too(made: Made) -> None:
    made.store.transactions = {"f-R": "t-R"}
    assert await made.archive.withdraw("f-R") is True
    (row,) = made.store.rows
    assert (row.feedback_id, row.transaction_id) == ("f-R", "t-R")


async def test_what_is_not_there_is_not_withdrawn(made: Made) -> None:
    made.store.corrections = [correction("A")]
    await made.correct("A")
    assert await made.archive.withdraw("f-Z") is False
    assert len(made.store.rows) == 1


async def test_an_example_can_be_withdrawn_while_the_database_is_away(made: Made) -> None:
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    made.archive.start()
    await until(lambda: made.store.since)
    made.store.failure = AWAY
    assert await made.archive.withdraw("f-B") is True
    assert made.used == ["f-A"]
    assert isinstance(made.store.rows[-1], FeedbackWithdrawalSchema)
    with pytest.raises(DatabaseUnavailable, match=r"It cannot be read\."):
        await made.archive.withdraw("f-R")
    # Once the database is back, another one takes its place.
    made.store.failure, made.store.corrections = None, [correction("A"), correction("0")]
    await until(lambda: made.used == ["f-0", "f-A"])


async def test_a_withdrawal_that_is_not_stored_changes_nothing(made: Made) -> None:
    made.store.corrections = [correction("A")]
    await made.correct("A")
    made.store.is_full = True
    with pytest.raises(DatabaseUnavailable, match="The disk is full"):
        await made.archive.withdraw("f-A")
    assert made.used == ["f-A"]


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
    assert made.used == ["f-A"]
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
    assert made.archive.database_id is None
    made.store.database_id = "d-1"
    assert made.archive.database_id == "d-1"
    assert (made.archive.refusal(), made.archive.is_whole()) == (None, True)
    made.store.is_away = True
    assert (made.archive.refusal(), made.archive.is_whole()) == (None, False)
