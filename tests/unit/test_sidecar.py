"""What a sidecar does with a request: which model is asked what, which rows and events follow."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from typing import Any

import pytest
from llm_sidecar.services.examples import Outcome

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.deadline import Deadline
from llm_sidecar.engines import GenerationRequest
from llm_sidecar.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    NotFound,
    QueueFull,
    SidecarError,
)
from llm_sidecar.input_model import longest_payload
from llm_sidecar.proposals import Example
from llm_sidecar.settings import Settings
from tests.unit.fakes import FakeParts, completion

PROMPT = "Long ABC from 100, now 112.5."
PROPOSAL: dict[str, Any] = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 1.5,
    "new_target_pct": None,
    "confidence": 0.7,
    "rationale": "The trend is intact.",
}
WRITTEN = completion(proposals.dumps(PROPOSAL), adapter="20260102", completion_tokens=40)
CRITIQUE = completion("The target is thin.", model="hermes/fake")
SURE = dict.fromkeys(hermes_plugin.SCORE_ANSWERS, 0.0) | {"0": 0.25, "10": 0.75}
"""Probabilities of the score 0.75."""


def parts(**settings: Any) -> FakeParts:
    """A sidecar whose models have one proposal, one critique and one score to give."""
    made = FakeParts(Settings(redis_url="memory://", **settings))
    made.phi3.answers = [WRITTEN]
    made.hermes.answers = [CRITIQUE, SURE]
    return made


def without(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}


# A proposal


async def test_phi3_is_asked_with_the_examples_oldest_first() -> None:
    made = parts(phi3_temperature=0.4)
    made.archive.examples = (Example("older", {"ticker": "A"}), Example("newer", {"ticker": "B"}))
    await made.sidecar.propose(PROMPT, 300)
    messages = proposals.build_messages(PROMPT, made.archive.examples)
    assert [turn["content"] for turn in messages[1:]] == [
        *("older", '{"ticker":"A"}', "newer", '{"ticker":"B"}', PROMPT)
    ]
    assert made.phi3.asked == [GenerationRequest(messages, 300, proposals.GUIDANCE, 0.4)]


async def test_hermes_is_asked_for_a_critique_and_then_for_a_score() -> None:
    made = parts(hermes_temperature=0.6)
    await made.sidecar.propose(PROMPT, 300)
    critique = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, PROPOSAL, PROMPT)
    score = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, PROPOSAL, PROMPT)
    assert made.hermes.asked == [
        GenerationRequest(critique, 300, None, 0.6),
        (score, hermes_plugin.SCORE_ANSWERS),
    ]


async def test_the_result_is_what_the_models_gave() -> None:
    result = await parts().sidecar.propose(PROMPT, 300)
    assert isinstance(result.transaction_id, uuid.UUID)
    assert (result.proposal, result.completion) == (PROPOSAL, WRITTEN)
    assert (result.assessment, result.score) == (CRITIQUE, 0.75)
    assert (result.grounded, result.stored) == ("true", True)


async def test_it_leaves_a_run_a_score_and_a_proposal() -> None:
    made = parts()
    name = str((await made.sidecar.propose(PROMPT, 300)).transaction_id)
    rows = dict(made.happened.of("row"))
    assert len(made.happened.of("row")) == len(rows) == 3
    run = rows["OrchestratorRunSchema"]
    assert json.loads(run["final_output"]) == {
        "proposal": PROPOSAL,
        "assessment": "The target is thin.",
        "score": 0.75,
    }
    assert without(run, "timestamp", "row_id", "final_output") == {
        "run_id": name,
        "input_query": PROMPT,
        "status": "success",
        "error_message": None,
    }
    assert without(rows["HermesScoreSchema"], "timestamp", "row_id") == {
        "run_id": name,
        "score": 0.75,
        "rationale": "The target is thin.",
    }
    expected = {
        "transaction_id": name,
        "prompt": PROMPT,
        "proposal": proposals.dumps(PROPOSAL),
        "assessment": "The target is thin.",
        "score": 0.75,
        "model": "phi3/fake",
        "adapter": "20260102",
        "grounded": "true",
    }
    assert {column: rows["ProposalSchema"][column] for column in expected} == expected


async def test_its_latencies_are_those_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = 0.0
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead)

    def take(*seconds: float) -> Any:
        left = list(seconds)

        def pass_time() -> None:
            nonlocal ahead
            ahead += left.pop(0)

        return pass_time

    made = parts()
    made.phi3.before_answer, made.hermes.before_answer = take(10), take(5, 20)
    await made.sidecar.propose(PROMPT, 300)
    latencies = dict(made.happened.of("row"))["ProposalSchema"]["latencies"]
    assert latencies == {
        "proposal": pytest.approx(10, abs=2),
        "assessment": pytest.approx(5, abs=2),
        "score": pytest.approx(20, abs=2),
    }


async def test_a_proposal_is_published_at_once_and_its_assessment_once_it_is_stored() -> None:
    made = parts()
    published: list[int] = []
    made.hermes.before_answer = lambda: published.append(len(made.happened.of("event")))
    name = str((await made.sidecar.propose(PROMPT, 300)).transaction_id)
    # It was published before Hermes was asked for anything.
    assert published == [1, 1]
    assert [kind for kind, *_ in made.happened.log if kind != "metric"] == [
        *("event", "row", "row", "row", "event")
    ]
    (created, assessed) = made.happened.of("event")
    assert created == ("phi3.proposal.created", PROPOSAL | {"transaction_id": name})
    channel, payload = assessed
    assert channel == "phi3.proposal.assessed"
    assert payload["timestamp"].endswith("+00:00")
    assert without(payload, "timestamp") == {
        "proposal_transaction_id": name,
        "assessment_text": "The target is thin.",
    }


async def test_proposal_and_score_are_counted() -> None:
    made = parts()
    await made.sidecar.propose(PROMPT, 300)
    assert made.happened.of("metric") == [("proposed", ("adjust",)), ("scored", 0.75)]


UNGROUNDED = PROPOSAL | {"ticker": "NEW", "rationale": "RSI is at 78."}
OTHER = completion(proposals.dumps(UNGROUNDED))


async def test_what_is_not_grounded_is_reported_everywhere() -> None:
    made = parts()
    made.phi3.answers = [OTHER]
    result = await made.sidecar.propose(PROMPT, 300)
    assert result.grounded == "ticker,rationale"
    assert dict(made.happened.of("row"))["ProposalSchema"]["grounded"] == "ticker,rationale"
    assert made.happened.of("metric")[0] == ("proposed", ("adjust", "ticker", "rationale"))


async def test_with_grounding_retry_it_is_asked_for_once_more() -> None:
    made = parts(grounding="retry")
    made.phi3.answers = [OTHER, WRITTEN]
    result = await made.sidecar.propose(PROMPT, 300)
    assert (result.proposal, result.grounded) == (PROPOSAL, "true")
    assert len(made.phi3.asked) == 2
    assert made.happened.of("metric")[0] == ("proposed", ("adjust",))


async def test_all_calls_of_a_request_share_its_deadline() -> None:
    made = parts(request_timeout=7.0)
    before = time.monotonic()
    await made.sidecar.propose(PROMPT, 300)
    (deadline,) = made.phi3.deadlines
    assert isinstance(deadline, Deadline)
    assert deadline.seconds == 7.0
    assert before <= deadline.began <= time.monotonic()
    assert made.hermes.deadlines == [deadline, deadline]


@pytest.mark.parametrize("failure", [ModelUnavailable("gone"), DeadlineExceeded("too late")])
async def test_a_run_that_fails_leaves_a_row_that_says_why(failure: SidecarError) -> None:
    made = parts()
    made.phi3.answers = [failure]
    with pytest.raises(type(failure), match=failure.detail):
        await made.sidecar.propose(PROMPT, 300)
    ((name, row),) = made.happened.of("row")
    assert name == "OrchestratorRunSchema"
    assert uuid.UUID(row["run_id"])
    assert without(row, "timestamp", "row_id", "run_id") == {
        "input_query": PROMPT,
        "final_output": "",
        "status": "error",
        "error_message": failure.detail,
    }
    assert made.happened.of("event") == made.hermes.asked == []


async def test_a_proposal_that_hermes_does_not_assess_is_stored_as_partial() -> None:
    made = parts()
    made.hermes.answers = [DeadlineExceeded("hermes is late", retry_after=3)]
    with pytest.raises(DeadlineExceeded, match="hermes is late") as caught:
        await made.sidecar.propose(PROMPT, 300)
    rows = dict(made.happened.of("row"))
    assert set(rows) == {"OrchestratorRunSchema", "ProposalSchema"}
    run, proposal = rows["OrchestratorRunSchema"], rows["ProposalSchema"]
    assert (run["status"], run["error_message"]) == ("partial", "hermes is late")
    assert json.loads(run["final_output"]) == {
        "proposal": PROPOSAL,
        "assessment": None,
        "score": None,
    }
    assert (proposal["proposal"], proposal["score"]) == (proposals.dumps(PROPOSAL), None)
    ((channel, created),) = made.happened.of("event")
    assert channel == "phi3.proposal.created"
    assert run["run_id"] == proposal["transaction_id"] == created["transaction_id"]
    # The error says where the proposal is.
    assert str(caught.value.transaction_id) == run["run_id"]
    assert (caught.value.stored, caught.value.retry_after) == (True, 3)


async def test_a_score_that_fails_leaves_proposal_and_critique() -> None:
    made = parts()
    made.hermes.answers = [CRITIQUE, ModelUnavailable("hermes is gone")]
    with pytest.raises(ModelUnavailable, match="hermes is gone"):
        await made.sidecar.propose(PROMPT, 300)
    rows = dict(made.happened.of("row"))
    assert set(rows) == {"OrchestratorRunSchema", "ProposalSchema"}
    assert rows["ProposalSchema"]["assessment"] == "The target is thin."


async def test_a_failed_run_that_is_not_stored_says_so() -> None:
    made = parts()
    made.hermes.answers = [ModelUnavailable("hermes is gone")]
    made.archive.failure = DatabaseUnavailable("The disk is full.")
    with pytest.raises(ModelUnavailable, match="hermes is gone") as caught:
        await made.sidecar.propose(PROMPT, 300)
    assert (caught.value.transaction_id, caught.value.stored) == (None, False)


@pytest.mark.parametrize("failure", [InvalidRequest("prompt: too long"), QueueFull("full")])
async def test_a_refused_request_leaves_no_row(failure: SidecarError) -> None:
    made = parts()
    made.phi3.answers = [failure]
    with pytest.raises(type(failure)) as caught:
        await made.sidecar.propose(PROMPT, 300)
    assert made.happened.log == []
    assert (caught.value.transaction_id, caught.value.stored) == (None, True)


@pytest.mark.parametrize("failure", [InvalidRequest("prompt: too long"), QueueFull("full")])
async def test_a_proposal_that_hermes_refuses_is_stored_all_the_same(failure: SidecarError) -> None:
    made = parts()
    made.hermes.answers = [failure]
    with pytest.raises(type(failure)) as caught:
        await made.sidecar.propose(PROMPT, 300)
    assert set(dict(made.happened.of("row"))) == {"OrchestratorRunSchema", "ProposalSchema"}
    assert caught.value.transaction_id is not None


async def stored_after(made: FakeParts, count: int) -> dict[str, dict[str, Any]]:
    """The rows, once there are so many; they are stored in the background."""
    async with asyncio.timeout(5):
        while len(made.happened.of("row")) < count:
            await asyncio.sleep(0)
    return dict(made.happened.of("row"))


async def test_a_client_that_leaves_after_the_proposal_loses_nothing() -> None:
    made = parts()
    asked = asyncio.Event()

    async def never(*_: object, **__: object) -> Any:
        asked.set()
        await asyncio.Event().wait()

    made.hermes.generate = never  # type: ignore[method-assign]
    asking = asyncio.create_task(made.sidecar.propose(PROMPT, 300))
    await asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    rows = await stored_after(made, 2)
    run = rows["OrchestratorRunSchema"]
    assert (run["status"], run["error_message"]) == (
        "partial",
        "The client disconnected, or the server ended, before Hermes had finished.",
    )
    assert rows["ProposalSchema"]["transaction_id"] == run["run_id"]


async def test_an_unexpected_failure_after_the_proposal_loses_nothing() -> None:
    made = parts()
    made.hermes.answers = [KeyError("a secret")]
    with pytest.raises(KeyError):
        await made.sidecar.propose(PROMPT, 300)
    run = (await stored_after(made, 2))["OrchestratorRunSchema"]
    assert (run["status"], run["error_message"]) == (
        "partial",
        "It failed unexpectedly: KeyError.",
    )


async def test_an_unexpected_failure_before_it_leaves_no_row() -> None:
    made = parts()
    made.phi3.answers = [KeyError("a secret")]
    with pytest.raises(KeyError):
        await made.sidecar.propose(PROMPT, 300)
    for _ in range(20):
        await asyncio.sleep(0)
    assert made.happened.log == []


async def test_a_database_that_is_away_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    made = parts()
    made.archive.failure = DatabaseUnavailable("The disk is full.")
    result = await made.sidecar.propose(PROMPT, 300)
    assert (result.proposal, result.score, result.stored) == (PROPOSAL, 0.75, False)
    assert [channel for channel, _ in made.happened.of("event")] == [
        *("phi3.proposal.created", "phi3.proposal.assessed")
    ]
    tables = ["hermes_scores", "orchestrator_runs", "proposals"]
    assert sorted(caplog.messages) == [
        f"a row of {table} is not stored: The disk is full." for table in tables
    ]
    lost = [table for name, table in made.happened.of("metric") if name == "row_lost"]
    assert sorted(lost) == tables


# One model alone


async def test_a_proposal_alone_is_neither_stored_nor_published() -> None:
    made = parts()
    proposed = await made.sidecar.generate_phi3(PROMPT, 300)
    assert proposed == (PROPOSAL, WRITTEN, ())
    assert made.happened.log == [("metric", "proposed", ("adjust",))]
    messages = proposals.build_messages(PROMPT)
    assert made.phi3.asked == [GenerationRequest(messages, 300, proposals.GUIDANCE, 0.0)]
    (deadline,) = made.phi3.deadlines
    assert deadline is not None
    assert deadline.seconds == 60.0


async def test_a_proposal_alone_is_asked_for_again_where_it_is_not_grounded() -> None:
    made = parts(grounding="retry")
    made.phi3.answers = [OTHER, WRITTEN]
    assert (await made.sidecar.generate_phi3(PROMPT, 300)).proposal == PROPOSAL


async def test_a_free_question_is_neither_stored_nor_published() -> None:
    made = parts(hermes_temperature=0.6)
    assert await made.sidecar.generate_hermes("What now?", 12) is CRITIQUE
    messages = hermes_plugin.chat_messages("What now?")
    assert made.hermes.asked == [GenerationRequest(messages, 12, None, 0.6)]
    assert made.happened.log == []


# A score


async def test_a_score_is_stored_under_the_proposals_own_id() -> None:
    made = parts()
    made.hermes.answers = [SURE]
    name = uuid.uuid4()
    scored = PROPOSAL | {"id": str(name)}
    result = await made.sidecar.score(scored, "ABC is quiet.")
    assert (result.proposal_id, result.score, result.stored) == (name, 0.75, True)
    messages = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, scored, "ABC is quiet.")
    assert made.hermes.asked == [(messages, hermes_plugin.SCORE_ANSWERS)]
    ((kind, row),) = made.happened.of("row")
    assert kind == "HermesScoreSchema"
    assert without(row, "timestamp", "row_id") == {
        "run_id": str(name),
        "score": 0.75,
        "rationale": "The trend is intact.",
    }
    assert made.happened.of("metric") == [("scored", 0.75)]
    assert made.happened.of("event") == []


@pytest.mark.parametrize("identifier", ["seven", "", 7, None, ["x"], {"a": 1}])
async def test_a_proposal_whose_id_is_no_uuid_gets_one(identifier: object) -> None:
    made = parts()
    made.hermes.answers = [SURE]
    result = await made.sidecar.score(PROPOSAL | {"id": identifier}, None)
    assert isinstance(result.proposal_id, uuid.UUID)
    assert result.score == 0.75
    ((_, row),) = made.happened.of("row")
    assert row["run_id"] == str(result.proposal_id)


@pytest.mark.parametrize("proposal", [{"a": 1}, {"rationale": None}, {"rationale": 7}])
async def test_a_rationale_that_is_no_text_is_left_out(proposal: dict[str, Any]) -> None:
    made = parts()
    made.hermes.answers = [SURE]
    await made.sidecar.score(proposal, None)
    ((_, row),) = made.happened.of("row")
    assert row["rationale"] == ""


async def test_a_score_that_is_not_stored_says_so() -> None:
    made = parts()
    made.hermes.answers = [SURE]
    made.archive.failure = DatabaseUnavailable("The disk is full.")
    result = await made.sidecar.score(PROPOSAL, None)
    assert (result.score, result.stored) == (0.75, False)
    assert made.happened.of("metric") == [("scored", 0.75), ("row_lost", "hermes_scores")]


async def test_a_score_that_fails_is_not_stored() -> None:
    made = parts()
    made.hermes.answers = [ModelUnavailable("hermes is gone")]
    with pytest.raises(ModelUnavailable, match="hermes is gone"):
        await made.sidecar.score(PROPOSAL, None)
    assert made.happened.log == []


# Feedback


def feedback() -> Phi3FeedbackSchema:
    return Phi3FeedbackSchema(
        transaction_id="t-1",
        timestamp="2026-01-02T03:04:05Z",
        feedback_type="correction",
        feedback_content={"why": "too tight"},
        corrected_proposal=PROPOSAL,
    )


async def test_feedback_is_stored_and_then_published() -> None:
    made = parts()
    made.archive.outcome = Outcome.EXAMPLE
    feedback_id, outcome = await made.sidecar.submit_feedback(feedback())
    assert outcome is Outcome.EXAMPLE
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
    made = parts()
    await made.sidecar.submit_feedback(feedback(), "desk")
    ((_, row),), ((_, event),) = made.happened.of("row"), made.happened.of("event")
    assert (row["author"], event["author"]) == ("desk", "desk")


async def test_others_hear_in_which_database_feedback_is_stored() -> None:
    made = parts()
    await made.sidecar.submit_feedback(feedback())
    await made.sidecar.submit_feedback(feedback())
    made.archive.database_id = "d-1"
    await made.sidecar.submit_feedback(feedback())
    one, again, known = (event["stored_in"] for _, event in made.happened.of("event"))
    # Until the database's name is known the sidecar says its own.
    assert one == again
    assert len(one) == 32
    assert known == "d-1"


async def test_feedback_that_is_not_stored_is_not_published() -> None:
    made = parts()
    made.archive.failure = DatabaseUnavailable("The disk is full.")
    with pytest.raises(DatabaseUnavailable, match=r"The disk is full\."):
        await made.sidecar.submit_feedback(feedback())
    assert made.happened.log == []


async def test_feedback_can_be_withdrawn() -> None:
    made = parts()
    made.archive.known = {"f-1"}
    await made.sidecar.withdraw_feedback("f-1")
    with pytest.raises(NotFound) as caught:
        await made.sidecar.withdraw_feedback("f-2")
    assert caught.value.detail == "There is no feedback with this feedback_id."
    assert made.happened.of("archive") == [("withdraw", "f-1"), ("withdraw", "f-2")]


# Feedback that another service publishes

PUBLISHED: dict[str, Any] = {
    "transaction_id": "t-1",
    "feedback_type": "rating",
    "feedback_content": "good",
}


async def hear(made: FakeParts, payload: str) -> None:
    """As the event bus does it."""
    await made.sidecar._store_published_feedback(payload)


async def test_a_publisher_cannot_write_in_the_name_of_an_api_key() -> None:
    made = parts()
    await hear(made, json.dumps(PUBLISHED | {"author": "desk"}))
    ((_, row),) = made.happened.of("row")
    assert row["author"] is None
    assert made.happened.of("refusal") == []


@pytest.mark.parametrize(
    "given", [{"timestamp": "2026-01-02T03:04:05Z"}, {"feedback_id": "f-1"}, {}]
)
async def test_what_another_service_publishes_is_stored(given: dict[str, Any]) -> None:
    made = parts()
    await hear(made, json.dumps(PUBLISHED | given))
    ((_, row),) = made.happened.of("row")
    assert {name: row[name] for name in PUBLISHED} == PUBLISHED
    assert row["feedback_id"] == given.get("feedback_id", row["feedback_id"])
    # It is out already.
    assert made.happened.of("event") == []


@pytest.mark.parametrize("given", [{}, {"timestamp": None}])
async def test_without_a_time_its_id_follows_from_the_message(given: dict[str, Any]) -> None:
    """Each sidecar that hears it gives it a time of its own, and all of them the same id."""
    made, payload = parts(), json.dumps(PUBLISHED | given)
    await hear(made, payload)
    ((_, row),) = made.happened.of("row")
    assert row["feedback_id"] == hashlib.sha256(payload.encode()).hexdigest()


async def test_with_a_time_its_id_follows_from_what_it_says() -> None:
    made = parts()
    timed = PUBLISHED | {"timestamp": "2026-01-02T03:04:05Z"}
    await hear(made, json.dumps(timed))
    await hear(made, json.dumps(timed, indent=1))
    (_, one), (_, other) = made.happened.of("row")
    assert one["feedback_id"] == other["feedback_id"]


@pytest.mark.parametrize("stored_in", ["ours", "d-1"])
async def test_feedback_of_the_same_database_is_not_stored_and_refreshes_the_examples(
    stored_in: str,
) -> None:
    made = parts()
    await made.sidecar.submit_feedback(feedback())
    ((_, event),) = made.happened.of("event")
    made.archive.database_id = "d-1"
    made.happened.log.clear()
    name = event["stored_in"] if stored_in == "ours" else stored_in
    await hear(made, json.dumps(event | {"stored_in": name}))
    assert made.happened.log == [("archive", "refresh_soon", None)]


@pytest.mark.parametrize("stored_in", ["d-2", "", None])
async def test_what_is_in_another_database_is_stored(stored_in: str | None) -> None:
    made = parts()
    await hear(made, json.dumps(PUBLISHED | {"stored_in": stored_in}))
    assert [kind for kind, *_ in made.happened.log] == ["row"]


REFUSED = {
    "": ": Invalid JSON: EOF while parsing a value at line 1 column 0",
    "[]": ": Input should be a valid dictionary or instance of PublishedFeedback",
    '{"transaction_id": "t"}': "feedback_type: Field required; feedback_content: Field required",
}


@pytest.mark.parametrize("payload", REFUSED)
async def test_what_is_no_feedback_is_refused_with_the_reason(payload: str) -> None:
    made = parts()
    await hear(made, payload)
    reason = REFUSED[payload].removeprefix(": ")
    assert made.happened.log == [("refusal", "phi3.feedback.submitted", reason)]


async def test_feedback_that_is_too_long_is_refused() -> None:
    made = parts(max_prompt_chars=100)
    await hear(made, json.dumps(PUBLISHED | {"feedback_content": "x" * 101}))
    await hear(made, json.dumps(PUBLISHED | {"feedback_content": "x" * 100}))
    longest = longest_payload(100)
    await hear(made, " " * longest + json.dumps(PUBLISHED))
    padding = " " * (longest - len(json.dumps(PUBLISHED)))
    await hear(made, padding + json.dumps(PUBLISHED))
    reason = "feedback_content: Text is too long; MAX_PROMPT_CHARS takes 100 characters"
    assert [(kind, name) for kind, name, _ in made.happened.log] == [
        ("refusal", "phi3.feedback.submitted"),
        ("row", "PublishedFeedback"),
        ("refusal", "phi3.feedback.submitted"),
        ("row", "PublishedFeedback"),
    ]
    assert [reason for _, reason in made.happened.of("refusal")] == [reason, "it is too long"]


async def test_feedback_waits_for_a_database_that_is_away_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, pauses = parts(), []
    made.archive.failure = DatabaseUnavailable("The disk is full.")

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            made.archive.failure = None

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await hear(made, json.dumps(PUBLISHED))
    assert pauses == [1.0, 1.0, 1.0]
    assert caplog.messages == ["feedback of another service waits: The disk is full."]
    assert len(made.happened.of("row")) == 1
