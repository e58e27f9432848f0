"""A run: its model calls, rows and events, and its early ends."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import Correction, OrchestratorRunSchema
from llm_sidecar.db.transaction import RequestKey
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
    SidecarError,
)
from llm_sidecar.models.base import Delta, GenerationRequest
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.proposal_run import UNFINISHED, AssessedProposal
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeSidecar, PausedModel, last_of, until
from tests.unit.services.samples import (
    CRITIQUE,
    PROMPT,
    PROPOSAL,
    SEED,
    SURE,
    UNGROUNDED,
    WRITTEN,
    fake_sidecar,
    without,
)


async def propose(made: FakeSidecar) -> AssessedProposal:
    return await last_of(
        made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt()), AssessedProposal
    )


async def test_phi3_is_asked_with_the_examples_oldest_first() -> None:
    made = fake_sidecar(models={"phi3_temperature": 0.4})
    made.sidecar.few_shot.corrections = (
        Correction("older", {"ticker": "A"}, "t-1", "f-1"),
        Correction("newer", {"ticker": "B"}, "t-2", "f-2"),
    )
    await propose(made)
    messages = proposals.build_messages(PROMPT, made.sidecar.few_shot.examples)
    assert [turn["content"] for turn in messages[1:]] == [
        *("older", '{"ticker":"A"}', "newer", '{"ticker":"B"}', PROMPT)
    ]
    assert made.phi3.requests == [GenerationRequest(messages, 300, proposals.GUIDANCE, 0.4, SEED)]


async def test_hermes_is_asked_for_a_critique_and_then_for_a_score() -> None:
    made = fake_sidecar(models={"hermes_temperature": 0.6})
    await propose(made)
    critique = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, PROPOSAL, PROMPT)
    score = hermes_plugin.score_messages(PROPOSAL, PROMPT)
    assert made.hermes.requests == [
        GenerationRequest(critique, 96, None, 0.6, SEED),
        (score, hermes_plugin.SCORE_ANSWERS),
    ]


async def test_the_result_is_what_the_models_gave() -> None:
    result = await propose(fake_sidecar())
    assert isinstance(result.transaction_id, uuid.UUID)
    assert (result.proposal, result.completion) == (PROPOSAL, WRITTEN)
    assert (result.assessment, result.rating) == (CRITIQUE, (0.75, 1.0, True))
    assert (result.grounded, result.stored) == ("true", True)


async def test_it_leaves_a_run_a_score_and_a_proposal() -> None:
    made = fake_sidecar()
    name = str((await propose(made)).transaction_id)
    rows = dict(made.happened.of("row"))
    assert len(made.happened.of("row")) == len(rows) == 3
    run = rows["OrchestratorRunSchema"]
    assert json.loads(run["final_output"]) == {
        "proposal": PROPOSAL,
        "assessment": "The target is thin.",
        "score": 0.75,
        "answer_mass": 1.0,
        "score_reliable": True,
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
        "answer_mass": 1.0,
        "score_reliable": True,
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

    made = fake_sidecar()
    made.phi3.before_answer, made.hermes.before_answer = take(10), take(5, 20)
    await propose(made)
    latencies = dict(made.happened.of("row"))["ProposalSchema"]["latencies"]
    assert latencies == {
        "proposal": pytest.approx(10, abs=2),
        "assessment": pytest.approx(5, abs=2),
        "score": pytest.approx(20, abs=2),
    }


async def test_a_proposal_is_durable_with_its_event_before_it_is_judged() -> None:
    made = fake_sidecar()
    committed: list[int] = []
    made.hermes.before_answer = lambda: committed.append(len(made.store.commits))
    name = str((await propose(made)).transaction_id)
    # It was durable before Hermes was asked for anything.
    assert committed == [1, 1]
    assert [kind for kind, *_ in made.happened.log if kind != "metric"] == [
        *("draft", "draft", "event"),
        *("row", "row", "row", "event"),
    ]
    first, second = made.store.commits
    assert (first.draft, first.replaces, second.draft, second.replaces) == (name, None, None, name)
    run, _ = first.rows
    assert isinstance(run, OrchestratorRunSchema)
    assert (run.status, run.error_message) == ("partial", UNFINISHED)
    (created, assessed) = made.happened.of("event")
    assert created == ("phi3.proposal.created", PROPOSAL | {"transaction_id": name})
    channel, payload = assessed
    assert channel == "phi3.proposal.assessed"
    assert payload["timestamp"].endswith("+00:00")
    assert without(payload, "timestamp") == {
        "proposal_transaction_id": name,
        "assessment_text": "The target is thin.",
        "score": 0.75,
        "answer_mass": 1.0,
    }


async def test_proposal_and_score_are_counted() -> None:
    made = fake_sidecar()
    await propose(made)
    assert made.happened.of("metric") == [
        ("proposed", ("adjust",)),
        ("scored", (0.75, 1.0, True)),
    ]


async def test_what_is_not_grounded_is_reported_everywhere() -> None:
    made = fake_sidecar()
    made.phi3.answers = [UNGROUNDED]
    result = await propose(made)
    assert result.grounded == "ticker,rationale"
    assert dict(made.happened.of("row"))["ProposalSchema"]["grounded"] == "ticker,rationale"
    assert made.happened.of("metric")[0] == ("proposed", ("adjust", "ticker", "rationale"))


async def test_with_grounding_retry_it_is_asked_for_once_more() -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, WRITTEN]
    result = await propose(made)
    assert (result.proposal, result.grounded) == (PROPOSAL, "true")
    assert len(made.phi3.requests) == 2
    assert made.happened.of("metric")[0] == ("proposed", ("adjust",))


async def test_all_calls_of_a_request_share_its_deadline() -> None:
    made = fake_sidecar(limits={"request_timeout": 7.0})
    before = time.monotonic()
    await propose(made)
    (deadline,) = [call.deadline for call in made.phi3.calls]
    assert isinstance(deadline, Deadline)
    assert deadline.seconds == 7.0
    assert before <= deadline.began <= time.monotonic()
    assert [call.deadline for call in made.hermes.calls] == [deadline, deadline]


@pytest.mark.parametrize("failure", [ModelUnavailable("gone"), DeadlineExceeded("too late")])
async def test_a_run_that_fails_leaves_a_row_that_says_why(failure: SidecarError) -> None:
    made = fake_sidecar()
    made.phi3.answers = [failure]
    with pytest.raises(type(failure), match=failure.detail):
        await propose(made)
    ((name, row),) = made.happened.of("row")
    assert name == "OrchestratorRunSchema"
    assert uuid.UUID(row["run_id"])
    assert without(row, "timestamp", "row_id", "run_id") == {
        "input_query": PROMPT,
        "final_output": "",
        "status": "error",
        "error_message": failure.detail,
    }
    assert made.happened.of("event") == made.hermes.requests == []


async def test_a_proposal_that_hermes_does_not_assess_is_stored_as_partial() -> None:
    made = fake_sidecar()
    made.hermes.answers = [DeadlineExceeded("hermes is late", retry_after=3)]
    with pytest.raises(DeadlineExceeded, match="hermes is late") as caught:
        await propose(made)
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


@pytest.mark.parametrize("critique", [[], [Delta("The target", "hermes/fake")]])
async def test_a_critique_that_ends_early_is_no_assessment(critique: list[Delta]) -> None:
    made = fake_sidecar()
    made.hermes.answers = [critique]
    with pytest.raises(ModelUnavailable, match="before it was complete") as caught:
        await propose(made)
    rows = dict(made.happened.of("row"))
    run = rows["OrchestratorRunSchema"]
    assert str(caught.value.transaction_id) == run["run_id"]
    assert (run["status"], run["error_message"]) == ("partial", caught.value.detail)
    assert rows["ProposalSchema"]["assessment"] == ""


async def test_a_score_that_fails_leaves_proposal_and_critique() -> None:
    made = fake_sidecar()
    made.hermes.answers = [CRITIQUE, ModelUnavailable("hermes is gone")]
    with pytest.raises(ModelUnavailable, match="hermes is gone"):
        await propose(made)
    rows = dict(made.happened.of("row"))
    assert set(rows) == {"OrchestratorRunSchema", "ProposalSchema"}
    assert rows["ProposalSchema"]["assessment"] == "The target is thin."


async def test_a_failed_run_that_is_not_stored_says_so() -> None:
    made = fake_sidecar()
    made.hermes.answers = [ModelUnavailable("hermes is gone")]
    made.store.full = DatabaseUnavailable("The disk is full.")
    with pytest.raises(ModelUnavailable, match="hermes is gone") as caught:
        await propose(made)
    assert (caught.value.transaction_id, caught.value.stored) == (None, False)


@pytest.mark.parametrize("failure", [InvalidRequest("prompt: too long"), QueueFull("full")])
async def test_a_refused_request_leaves_no_row(failure: SidecarError) -> None:
    made = fake_sidecar()
    made.phi3.answers = [failure]
    with pytest.raises(type(failure)) as caught:
        await propose(made)
    assert made.happened.log == []
    assert (caught.value.transaction_id, caught.value.stored) == (None, True)


@pytest.mark.parametrize("failure", [InvalidRequest("prompt: too long"), QueueFull("full")])
async def test_a_proposal_that_hermes_refuses_is_stored_all_the_same(failure: SidecarError) -> None:
    made = fake_sidecar()
    made.hermes.answers = [failure]
    with pytest.raises(type(failure)) as caught:
        await propose(made)
    assert set(dict(made.happened.of("row"))) == {"OrchestratorRunSchema", "ProposalSchema"}
    assert caught.value.transaction_id is not None


async def stored_after(made: FakeSidecar, count: int) -> dict[str, dict[str, Any]]:
    """The rows, once there are this many; they are stored in the background."""
    await until(lambda: len(made.happened.of("row")) >= count)
    return dict(made.happened.of("row"))


@pytest.mark.parametrize("end", ["cancel", "close"])
async def test_a_client_that_leaves_after_the_proposal_loses_nothing(end: str) -> None:
    hermes = PausedModel()
    made = FakeSidecar(hermes=hermes)
    made.phi3.answers = [WRITTEN]
    running = made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt())
    while getattr(item := await anext(running), "model", None) != "paused/fake":
        assert isinstance(item, Delta | Proposed)
    if end == "close":
        await running.aclose()
    else:
        asking = asyncio.ensure_future(anext(running))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert hermes.closed == 1
    rows = await stored_after(made, 2)
    run = rows["OrchestratorRunSchema"]
    assert (run["status"], run["error_message"]) == (
        "partial",
        "The client disconnected, or the server ended, before Hermes had finished.",
    )
    assert rows["ProposalSchema"]["transaction_id"] == run["run_id"]
    assert rows["ProposalSchema"]["assessment"] == ""


async def test_a_client_that_leaves_with_the_proposal_loses_nothing() -> None:
    made = fake_sidecar()
    running = made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt())
    while not isinstance(await anext(running), Proposed):
        pass
    await running.aclose()
    rows = await stored_after(made, 2)
    assert rows["OrchestratorRunSchema"]["status"] == "partial"
    assert rows["ProposalSchema"]["proposal"] == proposals.dumps(PROPOSAL)
    assert made.hermes.requests == []


async def test_a_client_that_leaves_before_the_proposal_stops_phi3_and_leaves_no_row() -> None:
    phi3 = PausedModel()
    made = FakeSidecar(phi3=phi3)
    running = made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt())
    assert await anext(running) == Delta("{", "paused/fake")
    await running.aclose()
    assert phi3.closed == 1
    for _ in range(20):
        await asyncio.sleep(0)
    assert made.happened.log == []


async def test_a_run_streams_the_proposal_the_critique_and_the_result() -> None:
    made = fake_sidecar()
    items = [
        item async for item in made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt())
    ]
    kinds = [type(item).__name__ for item in items]
    assert kinds == ["Delta", "Delta", "Proposed", "Delta", "Delta", "AssessedProposal"]
    texts = [item.text for item in items if isinstance(item, Delta)]
    assert "".join(texts[:2]) == WRITTEN.text
    assert "".join(texts[2:]) == CRITIQUE.text


async def test_an_unexpected_failure_after_the_proposal_loses_nothing() -> None:
    made = fake_sidecar()
    made.hermes.answers = [KeyError("a secret")]
    with pytest.raises(KeyError):
        await propose(made)
    run = (await stored_after(made, 2))["OrchestratorRunSchema"]
    assert (run["status"], run["error_message"]) == (
        "partial",
        "It failed unexpectedly: KeyError.",
    )


async def test_an_unexpected_failure_before_it_leaves_no_row() -> None:
    made = fake_sidecar()
    made.phi3.answers = [KeyError("a secret")]
    with pytest.raises(KeyError):
        await propose(made)
    for _ in range(20):
        await asyncio.sleep(0)
    assert made.happened.log == []


async def test_a_database_that_is_away_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    made = fake_sidecar()
    made.store.full = DatabaseUnavailable("The disk is full.")
    result = await propose(made)
    assert (result.proposal, result.rating.score, result.stored) == (PROPOSAL, 0.75, False)
    assert [channel for channel, _ in made.happened.of("event")] == [
        *("phi3.proposal.created", "phi3.proposal.assessed")
    ]
    tables = ["hermes_scores", "orchestrator_runs", "proposals"]
    assert sorted(caplog.messages) == [
        *(f"a row of {table} is not stored: The disk is full." for table in tables),
        "phi3.proposal.assessed is not durable: The disk is full.",
        "phi3.proposal.created is not durable: The disk is full.",
    ]
    lost = [table for name, table in made.happened.of("metric") if name == "row_lost"]
    assert sorted(lost) == tables


# With an `Idempotency-Key`

REQUEST = RequestKey("desk", "k-1")


class Retried:
    """Attempts at one request; each gets the state that the last one has kept."""

    def __init__(self) -> None:
        self.made = fake_sidecar()
        self.made.store.claimed.add(REQUEST)

    @property
    def state(self) -> dict[str, Any] | None:
        kept = self.made.store.requests.get(REQUEST)
        return None if kept is None else json.loads(kept.state or "")

    def attempt(self) -> Attempt:
        return Attempt(TaskSet(), Deadline.after(9.0), REQUEST, self.state)

    async def propose(self) -> AssessedProposal:
        running = self.made.sidecar.orchestrator.propose(PROMPT, 300, "desk", self.attempt())
        return await last_of(running, AssessedProposal)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The only row of each table, drafts that were replaced left out."""
        rows = self.made.happened.of("row")
        assert len(dict(rows)) == len(rows)
        return dict(rows)


async def test_the_first_transaction_keeps_the_proposal_and_the_second_the_result() -> None:
    retried = Retried()
    result = await retried.propose()
    first, second = (one.progress for one in retried.made.store.commits)
    assert first is not None
    assert second is not None
    states = [json.loads(one.state or "") for one in (first, second)]
    assert [state["transaction_id"] for state in states] == [str(result.transaction_id)] * 2
    assert states[0]["assessment"] is states[0]["rating"] is None
    assert states[1]["rating"] == {"score": 0.75, "answer_mass": 1.0, "reliable": True}


async def test_all_calls_of_an_attempt_have_its_deadline() -> None:
    retried = Retried()
    await retried.propose()
    (deadline, *others) = (
        call.deadline for call in (*retried.made.phi3.calls, *retried.made.hermes.calls)
    )
    assert isinstance(deadline, Deadline)
    assert deadline.seconds == 9.0
    assert others == [deadline, deadline]


@pytest.mark.parametrize("failure", [DeadlineExceeded("hermes is late"), KeyError("a secret")])
async def test_a_retry_goes_on_with_the_assessment_of_the_same_proposal(
    failure: Exception,
) -> None:
    retried = Retried()
    made = retried.made
    made.hermes.answers = [failure]
    with pytest.raises(type(failure)) as caught:
        await retried.propose()
    await until(lambda: len(made.store.commits) == 2)
    early_end = made.store.commits[1]
    # Nothing is final yet.
    assert early_end.draft == early_end.replaces == made.store.commits[0].draft
    assert made.happened.of("row") == []
    made.hermes.answers = [CRITIQUE, SURE]
    result = await retried.propose()
    assert str(result.transaction_id) == early_end.draft
    if isinstance(caught.value, SidecarError):
        assert caught.value.transaction_id == result.transaction_id
    assert (result.proposal, result.completion, result.grounded) == (PROPOSAL, WRITTEN, "true")
    assert len(made.phi3.calls) == 1
    assert made.store.commits[-1].replaces == early_end.draft
    rows = retried.rows()
    assert set(rows) == {"OrchestratorRunSchema", "ProposalSchema", "HermesScoreSchema"}
    assert rows["OrchestratorRunSchema"]["status"] == "success"
    assert [channel for channel, _ in made.happened.of("event")] == [
        *("phi3.proposal.created", "phi3.proposal.assessed")
    ]


async def test_a_retry_repeats_no_critique() -> None:
    retried = Retried()
    made = retried.made
    made.hermes.answers = [CRITIQUE, DeadlineExceeded("hermes is late")]
    with pytest.raises(DeadlineExceeded):
        await retried.propose()
    made.hermes.answers = [SURE]
    result = await retried.propose()
    assert (result.assessment, result.rating) == (CRITIQUE, (0.75, 1.0, True))


async def test_a_finished_run_is_neither_generated_nor_stored_again() -> None:
    retried = Retried()
    result = await retried.propose()
    commits = list(retried.made.store.commits)
    assert await retried.propose() == result
    assert retried.made.store.commits == commits


async def test_a_proposal_that_was_not_durable_is_written_anew() -> None:
    retried = Retried()
    made = retried.made
    made.store.full = DatabaseUnavailable("The disk is full.")
    made.hermes.answers = [ModelUnavailable("hermes is gone")]
    with pytest.raises(ModelUnavailable) as caught:
        await retried.propose()
    assert (caught.value.transaction_id, caught.value.stored) == (None, False)
    made.store.full = None
    made.phi3.answers, made.hermes.answers = [WRITTEN], [CRITIQUE, SURE]
    assert (await retried.propose()).stored
    assert len(made.phi3.calls) == 2


async def test_a_failure_of_phi3_leaves_no_state() -> None:
    retried = Retried()
    retried.made.phi3.answers = [ModelUnavailable("phi3 is gone")]
    with pytest.raises(ModelUnavailable):
        await retried.propose()
    assert retried.state is None
    assert retried.rows()["OrchestratorRunSchema"]["status"] == "error"
