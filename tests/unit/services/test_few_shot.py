"""The few-shot examples in memory: which are in use, and the outcome of a correction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llm_sidecar.db import Correction, Phi3FeedbackSchema
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus.facts import Fact
from llm_sidecar.proposals import Example
from llm_sidecar.services import few_shot as module
from llm_sidecar.services import refresh
from llm_sidecar.services.example_rules import Outcome
from llm_sidecar.services.few_shot import FewShotExamples
from tests.unit.fakes import FakeBus, FakeStore, until

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


class Made:
    """Few-shot examples over a fake store.

    Attributes:
        changes: how often they have changed.
    """

    def __init__(self, count: int = 3, context: int = 100_000, from_bus: bool = False) -> None:
        self.changes = 0
        self.store, self.bus = FakeStore(), FakeBus()
        self.few_shot = FewShotExamples(
            self.store.store,
            self.bus.bus,
            count=count,
            from_bus=from_bus,
            context_length=lambda: context,
            on_change=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    async def correct(self, name: str, **changes: Any) -> Outcome:
        """Stores a correction and reads its outcome."""
        sent = feedback(name, **changes)
        await self.store.commit(Transaction([sent]))
        return await self.few_shot.outcome(sent)

    @property
    def used(self) -> list[str]:
        """The examples in use."""
        return [correction.feedback_id for correction in self.few_shot.corrections]


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PAUSE", "_RETRY_PAUSE"):
        monkeypatch.setattr(refresh, name, 0.0)


@pytest.fixture
async def made() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.few_shot.close()


# Examples


async def test_the_examples_are_the_newest_corrections_oldest_first(made: Made) -> None:
    made.store.corrections = [correction(name) for name in ("D", "C", "B", "A")]
    assert await made.correct("D") is Outcome.EXAMPLE
    assert made.few_shot.corrections == tuple(correction(name) for name in ("B", "C", "D"))
    assert made.few_shot.examples == tuple(
        Example(f"prompt of {name}", proposal(name), f"f-{name}") for name in ("B", "C", "D")
    )
    assert made.changes == 1


async def test_only_what_can_be_an_example_is_read(made: Made) -> None:
    made.store.corrections = [correction("C"), correction("B", prompt="x" * 2001), correction("A")]
    await made.correct("C")
    assert made.used == ["f-A", "f-C"]
    bounds = {"proposal_bytes": 500, "prompt_bytes": 3000}
    assert made.store.queries == [{"count": 3, "from_bus": False, **bounds}]
    published = Made(count=2, from_bus=True)
    await published.correct("A")
    assert published.store.queries == [{"count": 2, "from_bus": True, **bounds}]


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
    made = Made(count=0)
    made.store.corrections = [correction("A")]
    assert await made.correct("A") is Outcome.OFF
    assert (made.store.queries, made.used) == ([], [])


async def test_many_corrections_at_once_are_read_together(made: Made) -> None:
    made.store.corrections = [correction("A")]
    made.store.readable.clear()
    first = asyncio.create_task(made.correct("A"))
    await until(lambda: made.store.queries)
    others = [asyncio.create_task(made.correct("A")) for _ in range(9)]
    for _ in range(20):
        await asyncio.sleep(0)
    made.store.readable.set()
    assert set(await asyncio.gather(first, *others)) == {Outcome.EXAMPLE}
    # One read for the first, and one that began after the last of the others.
    assert len(made.store.queries) == 2


async def test_reading_them_has_a_deadline(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds: float = module._READ_DEADLINE
    assert seconds == 8.0
    made.store.readable.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_READ_DEADLINE", 0.01)
        assert await made.correct("A") is Outcome.DATABASE_AWAY
    assert caplog.messages == [
        "the examples are not refreshed: The examples could not be read within 0.01 s."
    ]
    made.store.readable.set()
    made.store.corrections = [correction("A")]
    assert await made.correct("A") is Outcome.EXAMPLE


# The outcome of a correction


async def test_feedback_without_a_correction_asks_for_no_examples(made: Made) -> None:
    assert await made.correct("A", corrected_proposal=None) is Outcome.NO_CORRECTION
    assert [row.feedback_id for row in made.store.rows] == ["f-A"]
    assert made.store.queries == []


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
    assert made.store.queries == []


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
    assert (len(made.store.rows), made.store.queries, caplog.messages) == (1, [], [])
    made.store.is_away, made.store.failure = False, AWAY
    assert await made.correct("A") is Outcome.DATABASE_AWAY
    assert caplog.messages == ["the examples are not refreshed: It cannot be read."]
    assert made.changes == 0


async def test_what_was_not_known_is_read_once_the_database_is_back(made: Made) -> None:
    made.few_shot.start()
    await until(lambda: made.store.queries)
    made.store.failure, made.store.corrections = AWAY, [correction("A")]
    await made.correct("A")
    made.store.failure = None
    await until(lambda: made.used == ["f-A"])


async def test_a_correction_whose_run_arrives_late_is_an_example(made: Made) -> None:
    async def arrive(run_id: str) -> str:
        made.store.corrections = [correction("A")]
        return "prompt of A"

    made.store.prompt = arrive  # type: ignore[method-assign]
    assert await made.correct("A") is Outcome.EXAMPLE
    assert made.used == ["f-A"]


# Withdrawing


async def test_another_correction_replaces_a_withdrawn_example(made: Made) -> None:
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    made.store.corrections = [correction("A"), correction("0")]
    await made.few_shot.withdraw("f-B")
    assert (made.used, made.changes) == (["f-0", "f-A"], 2)


async def test_an_example_can_be_withdrawn_while_the_database_is_away(made: Made) -> None:
    made.store.corrections = [correction("B"), correction("A")]
    await made.correct("B")
    made.few_shot.start()
    await until(lambda: len(made.store.queries) == 2)
    made.store.failure = AWAY
    await made.few_shot.withdraw("f-B")
    assert made.used == ["f-A"]
    # Once the database is back, another one replaces it.
    made.store.failure, made.store.corrections = None, [correction("A"), correction("0")]
    await until(lambda: made.used == ["f-0", "f-A"])


# Following the database


async def test_the_examples_are_there_soon_after_the_start(made: Made) -> None:
    made.store.corrections = [correction("A")]
    made.few_shot.start()
    await until(lambda: made.used == ["f-A"])
    assert (made.store.timeouts, made.changes) == ([30.0], 1)


async def test_a_change_by_another_sidecar_is_read_at_once_and_again_later(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.01)
    made.few_shot.start()
    await until(lambda: made.store.queries)
    made.store.corrections = [correction("A")]
    made.bus.facts.set("feedback", Fact(1, None))
    await until(lambda: made.used == ["f-A"])
    # The run of another correction was still in the journal of its sidecar.
    made.store.corrections = [correction("B"), correction("A")]
    await until(lambda: made.used == ["f-A", "f-B"])


async def test_while_redis_is_away_the_examples_are_read_more_often(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._EVERY_WITHOUT_REDIS == 2.0
    monkeypatch.setattr(module, "_EVERY_WITHOUT_REDIS", 0.001)
    made.bus.connected = False
    made.few_shot.start()
    await until(lambda: len(made.store.queries) >= 3)
