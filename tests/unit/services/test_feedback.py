"""Feedback: stored, published, withdrawn; and feedback that another service publishes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from llm_sidecar import timestamps
from llm_sidecar.db import Correction, Phi3FeedbackSchema
from llm_sidecar.db.transaction import RequestKey, Transaction
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, NotFound
from llm_sidecar.event_bus.consumer_group import Entry
from llm_sidecar.input_model import longest_payload
from llm_sidecar.services.example_rules import Outcome
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeSidecar
from tests.unit.services.samples import PROPOSAL, fake_sidecar, without


def feedback() -> Phi3FeedbackSchema:
    return Phi3FeedbackSchema(
        transaction_id="t-1",
        timestamp="2026-01-02T03:04:05Z",
        feedback_type="correction",
        feedback_content={"why": "too tight"},
        corrected_proposal=PROPOSAL,
    )


async def test_feedback_is_stored_together_with_its_event() -> None:
    made = fake_sidecar()
    made.store.corrections = [Correction("Long ABC.", PROPOSAL, "t-1", "f-1")]
    sent = feedback().model_copy(update={"feedback_id": "f-1"})
    feedback_id, outcome = await made.sidecar.feedback.submit(sent, None, made.attempt())
    assert (feedback_id, outcome) == ("f-1", Outcome.EXAMPLE)
    assert [(kind, name) for kind, name, _ in made.happened.log] == [
        ("row", "Phi3FeedbackSchema"),
        ("event", "phi3.feedback.submitted"),
    ]
    ((_, row),), ((_, event),) = made.happened.of("row"), made.happened.of("event")
    expected = {
        "feedback_id": feedback_id,
        "transaction_id": "t-1",
        "timestamp": "2026-01-02T03:04:05Z",
        "feedback_type": "correction",
        "feedback_content": {"why": "too tight"},
        "corrected_proposal": PROPOSAL,
        "schema_version": "1.0",
    }
    assert row["feedback_id"] == feedback_id
    assert without(event, "stored_in") == expected


async def test_the_author_is_stored_and_published() -> None:
    made = fake_sidecar()
    await made.sidecar.feedback.submit(feedback(), "desk", made.attempt())
    ((_, row),), ((_, event),) = made.happened.of("row"), made.happened.of("event")
    assert (row["author"], event["author"]) == ("desk", "desk")


async def test_the_event_names_the_database_that_stores_the_feedback() -> None:
    made = fake_sidecar()
    await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    made.store.database_id = "d-1"
    await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    one, again, known = (event["stored_in"] for _, event in made.happened.of("event"))
    assert (one, again, known) == ("journal", "journal", "d-1")


async def test_feedback_that_is_not_stored_is_not_published() -> None:
    made = fake_sidecar()
    made.store.full = DatabaseUnavailable("The disk is full.")
    with pytest.raises(DatabaseUnavailable, match=r"The disk is full\."):
        await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    assert made.happened.log == []


async def test_feedback_is_one_transaction() -> None:
    made = fake_sidecar()
    await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    (transaction,) = made.store.commits
    assert (len(transaction.rows), len(transaction.events)) == (1, 1)
    assert transaction.progress is None


async def test_feedback_that_is_sent_again_with_its_key_is_stored_once() -> None:
    made, request = fake_sidecar(), RequestKey("desk", "k-1")
    made.store.claimed.add(request)
    # Its id depends on the time, which differs at the second attempt.
    sent = [feedback().model_copy(update={"timestamp": timestamps.now()}) for _ in range(2)]
    first = await made.sidecar.feedback.submit(
        sent[0], "desk", Attempt(TaskSet(), Deadline.after(60.0), request)
    )
    state = json.loads(made.store.requests[request].state or "")
    again = await made.sidecar.feedback.submit(
        sent[1], "desk", Attempt(TaskSet(), Deadline.after(60.0), request, state)
    )
    assert again == first
    assert [kind for kind, *_ in made.happened.log] == ["row", "event"]


async def test_feedback_is_stored_even_if_its_client_disconnects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, committing = fake_sidecar(), asyncio.Event()
    commit = made.store.commit

    async def slow_commit(transaction: Transaction) -> None:
        committing.set()
        await asyncio.sleep(0)
        await commit(transaction)

    monkeypatch.setattr(made.store, "commit", slow_commit)
    submitting = asyncio.create_task(made.sidecar.feedback.submit(feedback(), None, made.attempt()))
    await committing.wait()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await made.sidecar._tasks.join()
    assert [kind for kind, *_ in made.happened.log] == ["row", "event"]


# Withdrawing


async def test_feedback_can_be_withdrawn() -> None:
    made = fake_sidecar()
    made.store.transactions = {"f-1": "t-1"}
    await made.sidecar.feedback.withdraw("f-1")
    ((name, row),) = made.happened.of("row")
    assert name == "FeedbackWithdrawalSchema"
    assert (row["feedback_id"], row["transaction_id"]) == ("f-1", "t-1")
    with pytest.raises(NotFound) as caught:
        await made.sidecar.feedback.withdraw("f-2")
    assert caught.value.detail == "There is no feedback with this feedback_id."
    assert len(made.store.rows) == 1
    assert made.happened.of("event") == []


def in_use(made: FakeSidecar, *names: str) -> None:
    """These are the few-shot examples."""
    made.store.corrections = [Correction("Long ABC.", PROPOSAL, f"t-{n}", f"f-{n}") for n in names]
    made.sidecar.few_shot.corrections = tuple(reversed(made.store.corrections))


def used(made: FakeSidecar) -> list[str]:
    return [correction.feedback_id for correction in made.sidecar.few_shot.corrections]


async def test_another_correction_replaces_a_withdrawn_example() -> None:
    made = fake_sidecar()
    in_use(made, "B", "A")
    made.store.corrections = [Correction("x", PROPOSAL, f"t-{n}", f"f-{n}") for n in ("A", "0")]
    await made.sidecar.feedback.withdraw("f-B")
    assert used(made) == ["f-0", "f-A"]
    ((_, row),) = made.happened.of("row")
    assert (row["feedback_id"], row["transaction_id"]) == ("f-B", "t-B")


async def test_an_example_can_be_withdrawn_while_the_database_is_away() -> None:
    made = fake_sidecar()
    in_use(made, "B", "A")
    made.store.failure = DatabaseUnavailable("It cannot be read.")
    await made.sidecar.feedback.withdraw("f-B")
    assert used(made) == ["f-A"]
    assert [name for name, _ in made.happened.of("row")] == ["FeedbackWithdrawalSchema"]
    with pytest.raises(DatabaseUnavailable, match=r"It cannot be read\."):
        await made.sidecar.feedback.withdraw("f-R")
    assert len(made.store.rows) == 1


async def test_a_withdrawal_that_is_not_stored_changes_nothing() -> None:
    made = fake_sidecar()
    in_use(made, "A")
    made.store.full = DatabaseUnavailable("The disk is full.")
    with pytest.raises(DatabaseUnavailable, match=r"The disk is full\."):
        await made.sidecar.feedback.withdraw("f-A")
    assert used(made) == ["f-A"]


# Feedback that another service publishes

PUBLISHED: dict[str, Any] = {
    "transaction_id": "t-1",
    "feedback_type": "rating",
    "feedback_content": "good",
}


async def receive(made: FakeSidecar, *payloads: str) -> None:
    """As the event bus does it."""
    await made.sidecar.feedback.subscribe()
    await made.bus.subscribers["phi3.feedback.submitted"](payloads)


async def test_a_publisher_cannot_write_in_the_name_of_an_api_key() -> None:
    made = fake_sidecar()
    await receive(made, json.dumps(PUBLISHED | {"author": "desk"}))
    ((_, row),) = made.happened.of("row")
    assert row["author"] is None
    assert made.happened.of("refusal") == []


@pytest.mark.parametrize(
    "given", [{"timestamp": "2026-01-02T03:04:05Z"}, {"feedback_id": "f-1"}, {}]
)
async def test_what_another_service_publishes_is_stored(given: dict[str, Any]) -> None:
    made = fake_sidecar()
    await receive(made, json.dumps(PUBLISHED | given))
    ((_, row),) = made.happened.of("row")
    assert {name: row[name] for name in PUBLISHED} == PUBLISHED
    assert row["feedback_id"] == given.get("feedback_id", row["feedback_id"])
    # It is out already.
    assert made.happened.of("event") == []


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
async def test_without_a_time_its_id_follows_from_the_message(given: dict[str, Any]) -> None:
    """Each sidecar that receives it gives it a time of its own, and all of them the same id."""
    made, payload = fake_sidecar(), json.dumps(PUBLISHED | given)
    await receive(made, payload)
    ((_, row),) = made.happened.of("row")
    assert row["feedback_id"] == hashlib.sha256(payload.encode()).hexdigest()


async def test_with_a_time_its_id_follows_from_what_it_says() -> None:
    made = fake_sidecar()
    timed = PUBLISHED | {"timestamp": "2026-01-02T03:04:05Z"}
    await receive(made, json.dumps(timed))
    await receive(made, json.dumps(timed, indent=1))
    (_, one), (_, other) = made.happened.of("row")
    assert one["feedback_id"] == other["feedback_id"]


@pytest.mark.parametrize("stored_in", ["ours", "d-1"])
async def test_feedback_of_the_same_database_is_not_stored_and_refreshes_the_examples(
    stored_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_sidecar()
    await made.sidecar.feedback.submit(feedback(), None, made.attempt())
    ((_, event),) = made.happened.of("event")
    made.store.database_id = "d-1"
    made.happened.log.clear()
    refreshes: list[bool] = []
    monkeypatch.setattr(made.sidecar.few_shot, "refresh_soon", lambda: refreshes.append(True))
    name = event["stored_in"] if stored_in == "ours" else stored_in
    await receive(made, json.dumps(event | {"stored_in": name}))
    assert (made.happened.log, refreshes) == ([], [True])


@pytest.mark.parametrize("stored_in", ["d-2", "", None])
async def test_what_is_in_another_database_is_stored(stored_in: str | None) -> None:
    made = fake_sidecar()
    await receive(made, json.dumps(PUBLISHED | {"stored_in": stored_in}))
    assert [kind for kind, *_ in made.happened.log] == ["row"]


@pytest.mark.parametrize("counts", [False, True])
async def test_the_examples_are_read_again_where_published_feedback_can_be_one(
    counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_sidecar(proposals={"examples_from_bus": counts})
    refreshes: list[bool] = []
    monkeypatch.setattr(made.sidecar.few_shot, "refresh_soon", lambda: refreshes.append(True))
    await receive(made, json.dumps(PUBLISHED))
    assert len(made.happened.of("row")) == 1
    assert refreshes == [True] * counts


REFUSED = {
    "": ": Invalid JSON: EOF while parsing a value at line 1 column 0",
    "[]": ": Input should be a valid dictionary or instance of PublishedFeedback",
    '{"transaction_id": "t"}': "feedback_type: Field required; feedback_content: Field required",
}


@pytest.mark.parametrize("payload", REFUSED)
async def test_what_is_no_feedback_is_refused_with_the_reason(payload: str) -> None:
    made = fake_sidecar()
    await receive(made, payload)
    reason = REFUSED[payload].removeprefix(": ")
    assert made.happened.log == [("refusal", "phi3.feedback.submitted", reason)]


async def test_feedback_that_is_too_long_is_refused() -> None:
    made = fake_sidecar(limits={"max_prompt_chars": 100})
    await receive(made, json.dumps(PUBLISHED | {"feedback_content": "x" * 101}))
    await receive(made, json.dumps(PUBLISHED | {"feedback_content": "x" * 100}))
    longest = longest_payload(100)
    await receive(made, " " * longest + json.dumps(PUBLISHED))
    padding = " " * (longest - len(json.dumps(PUBLISHED)))
    await receive(made, padding + json.dumps(PUBLISHED))
    reason = "feedback_content: Text is too long; MAX_PROMPT_CHARS takes 100 characters"
    assert [(kind, name) for kind, name, _ in made.happened.log] == [
        ("refusal", "phi3.feedback.submitted"),
        ("row", "PublishedFeedback"),
        ("refusal", "phi3.feedback.submitted"),
        ("row", "PublishedFeedback"),
    ]
    assert [reason for _, reason in made.happened.of("refusal")] == [reason, "it is too long"]


async def test_feedback_waits_for_a_database_that_is_away_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, pauses = fake_sidecar(), []
    made.store.full = DatabaseUnavailable("The disk is full.")

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            made.store.full = None

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await receive(made, json.dumps(PUBLISHED))
    assert pauses == [1.0, 1.0, 1.0]
    assert caplog.messages == ["feedback of another service waits: The disk is full."]
    assert len(made.happened.of("row")) == 1


async def test_many_messages_are_committed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, commit = fake_sidecar(), asyncio.Event()
    waiting = most = 0

    async def group_commit(transaction: Transaction) -> None:
        nonlocal waiting, most
        waiting, most = waiting + 1, max(most, waiting + 1)
        await commit.wait()
        waiting -= 1
        made.store.rows += transaction.rows

    monkeypatch.setattr(made.store, "commit", group_commit)
    payloads = [json.dumps(PUBLISHED | {"feedback_id": f"f-{n}"}) for n in range(250)]
    receiving = asyncio.create_task(receive(made, *payloads))
    for _ in range(5):
        await asyncio.sleep(0)
    assert waiting == 100
    commit.set()
    await receiving
    assert (most, len(made.store.rows)) == (100, 250)


async def test_only_the_messages_that_are_not_stored_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, refused = fake_sidecar(), [3, 2]
    commit = made.store.commit

    async def refuse_some(transaction: Transaction) -> None:
        if refused[0]:
            refused[0] -= 1
            raise DatabaseUnavailable("The disk is full.")
        await commit(transaction)

    async def sleep(_: float) -> None:
        refused.pop(0)

    monkeypatch.setattr(made.store, "commit", refuse_some)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    refused.append(0)
    await receive(made, *(json.dumps(PUBLISHED | {"feedback_id": f"f-{n}"}) for n in range(5)))
    stored = [row["feedback_id"] for _, row in made.happened.of("row")]
    assert sorted(stored) == ["f-0", "f-1", "f-2", "f-3", "f-4"]
    assert caplog.messages == ["feedback of another service waits: The disk is full."]


async def test_a_defect_of_the_database_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_sidecar()

    async def fail(_: Transaction) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(made.store, "commit", fail)
    with pytest.raises(KeyError):
        await receive(made, json.dumps(PUBLISHED))


# Feedback in the inbox


def entry(**fields: str) -> Entry:
    """An entry with feedback, unless the fields say otherwise."""
    whole = {"type": "phi3.feedback.submitted", "id": "e-1", "data": json.dumps(PUBLISHED)}
    return Entry("1-1", whole | fields, 1)


async def take(made: FakeSidecar, *entries: Entry) -> list[str | None]:
    """Passes entries to the handler as the event bus does; returns the reason of each refusal."""
    await made.sidecar.feedback.subscribe()
    return list(await made.bus.subscribers["osiris.inbox"](entries))


async def test_entries_of_the_inbox_are_stored_once_by_their_ids() -> None:
    made = fake_sidecar()
    assert await take(made, entry(), entry(id="e-2"), entry()) == [None, None, None]
    rows = [row for _, row in made.happened.of("row")]
    assert [row["row_id"] for row in rows] == ["inbox:e-1", "inbox:e-2", "inbox:e-1"]
    assert {row["source"] for row in rows} == {"bus"}
    # They have the same content.
    assert len({row["feedback_id"] for row in rows}) == 1
    assert made.happened.of("event") == []


INVALID_ENTRIES = {
    "type: Input should be phi3.feedback.submitted": {"type": "phi3.proposal.created"},
    "id: Input should be text of 1 to 256 characters": {"id": "x" * 257},
    "Invalid JSON: EOF while parsing a value at line 1 column 0": {"data": ""},
    "feedback_content: Field required": {
        "data": json.dumps(without(PUBLISHED, "feedback_content"))
    },
}


@pytest.mark.parametrize("reason", INVALID_ENTRIES)
async def test_an_invalid_entry_is_refused_with_the_reason_and_the_others_are_stored(
    reason: str,
) -> None:
    made = fake_sidecar()
    found = await take(made, entry(), entry(**INVALID_ENTRIES[reason]), entry(id="e-2"))
    assert found == [None, reason, None]
    assert len(made.happened.of("row")) == 2
    assert made.happened.of("refusal") == []


@pytest.mark.parametrize("bad", ["", "a\x00b", "\ud800"])
async def test_the_id_of_an_entry_is_text(bad: str) -> None:
    found = await take(fake_sidecar(), entry(id=bad))
    assert found == ["id: Input should be text of 1 to 256 characters"]


@pytest.mark.parametrize("name", ["id", "data"])
async def test_an_entry_with_bytes_that_are_not_utf8_is_refused(name: str) -> None:
    # As redis-py decodes b"\xff" and b"\xfe".
    bad = {"id": "e-\ufffd", "data": json.dumps(PUBLISHED)[:-1] + ', "author": "\ufffd"}'}
    made = fake_sidecar()
    found = await take(made, entry(**{name: bad[name]}), entry(id="e-2"))
    assert found == [f"{name}: Input should be UTF-8 without U+FFFD", None]


@pytest.mark.parametrize("good", ["x", "x" * 256])
async def test_the_id_of_an_entry_has_1_to_256_characters(good: str) -> None:
    made = fake_sidecar()
    assert await take(made, entry(id=good)) == [None]
    assert [row["row_id"] for _, row in made.happened.of("row")] == [f"inbox:{good}"]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("id", "id: Input should be text of 1 to 256 characters"),
        ("data", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
    ],
)
async def test_an_entry_without_a_field_is_refused(missing: str, reason: str) -> None:
    fields = without(dict(entry().fields), missing)
    assert await take(fake_sidecar(), Entry("1-1", fields, 1)) == [reason]


async def test_each_of_many_entries_has_its_result() -> None:
    many = [entry(id=f"e-{number}") for number in range(150)]
    many[120] = entry(type="other")
    found = await take(fake_sidecar(), *many)
    assert [number for number, reason in enumerate(found) if reason is not None] == [120]
    assert len(found) == 150


async def test_an_entry_without_fields_is_refused() -> None:
    made = fake_sidecar()
    assert await take(made, Entry("1-1", {}, 1)) == [
        "type: Input should be phi3.feedback.submitted"
    ]


async def test_an_entry_waits_for_a_database_that_is_away() -> None:
    made = fake_sidecar()
    made.store.full = DatabaseUnavailable("The disk is full.")
    with pytest.raises(DatabaseUnavailable):
        await take(made, entry())
    made.store.full = None
    assert await take(made, entry()) == [None]


async def test_an_entry_of_the_same_database_is_not_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = fake_sidecar()
    made.store.database_id = "d-1"
    refreshes: list[bool] = []
    monkeypatch.setattr(made.sidecar.few_shot, "refresh_soon", lambda: refreshes.append(True))
    data = json.dumps(PUBLISHED | {"stored_in": "d-1"})
    assert await take(made, entry(data=data)) == [None]
    assert (made.happened.log, refreshes) == ([], [True])


async def test_an_event_of_the_sidecar_itself_is_accepted_with_a_time_in_the_future() -> None:
    made = fake_sidecar()
    made.store.database_id = "d-1"
    future = PUBLISHED | {"timestamp": "9999-01-01T00:00:00Z"}
    await receive(made, json.dumps(future | {"stored_in": "d-1"}))
    assert made.happened.log == []
    for other in ({"stored_in": "d-2"}, {"stored_in": 1}, {}):
        await receive(made, json.dumps(future | other))
    assert len(made.happened.of("refusal")) == 3
