"""Hermes' score and critique: the requests to the model, the rows, the errors."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.db.transaction import RequestKey
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, InvalidRequest, ModelUnavailable, QueueFull
from llm_sidecar.models.base import Delta, GenerationRequest
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.services.score import Rating, ScoredProposal
from llm_sidecar.tasks import TaskSet
from tests.unit.fakes import FakeSidecar, PausedModel, scores, text_of
from tests.unit.services.samples import (
    CRITIQUE,
    PROMPT,
    PROPOSAL,
    SEED,
    SURE,
    fake_sidecar,
    without,
)

CRITICISE = hermes_plugin.CRITIQUE_TASK


async def test_a_score_is_stored_under_the_proposals_own_id() -> None:
    made = fake_sidecar()
    made.hermes.answers = [SURE]
    name = uuid.uuid4()
    scored = PROPOSAL | {"id": str(name)}
    result = await made.sidecar.judge.score(scored, "ABC is quiet.", made.attempt())
    assert (result.proposal_id, result.rating, result.stored) == (name, (0.75, 1.0, True), True)
    messages = hermes_plugin.score_messages(scored, "ABC is quiet.")
    assert made.hermes.requests == [(messages, hermes_plugin.SCORE_ANSWERS)]
    ((kind, row),) = made.happened.of("row")
    assert kind == "HermesScoreSchema"
    assert without(row, "timestamp", "row_id") == {
        "run_id": str(name),
        "score": 0.75,
        "rationale": "The trend is intact.",
        "answer_mass": 1.0,
        "score_reliable": True,
    }
    assert made.happened.of("metric") == [("scored", (0.75, 1.0, True))]
    assert made.happened.of("event") == []


@pytest.mark.parametrize("identifier", ["seven", "", 7, None, ["x"], {"a": 1}])
async def test_a_proposal_whose_id_is_no_uuid_gets_one(identifier: object) -> None:
    made = fake_sidecar()
    made.hermes.answers = [SURE]
    result = await made.sidecar.judge.score(PROPOSAL | {"id": identifier}, None, made.attempt())
    assert isinstance(result.proposal_id, uuid.UUID)
    assert result.rating.score == 0.75
    ((_, row),) = made.happened.of("row")
    assert row["run_id"] == str(result.proposal_id)


@pytest.mark.parametrize("proposal", [{"a": 1}, {"rationale": None}, {"rationale": 7}])
async def test_a_rationale_that_is_no_text_is_left_out(proposal: dict[str, Any]) -> None:
    made = fake_sidecar()
    made.hermes.answers = [SURE]
    await made.sidecar.judge.score(proposal, None, made.attempt())
    ((_, row),) = made.happened.of("row")
    assert row["rationale"] == ""


async def test_a_score_that_is_not_stored_says_so() -> None:
    made = fake_sidecar()
    made.hermes.answers = [SURE]
    made.store.full = DatabaseUnavailable("The disk is full.")
    result = await made.sidecar.judge.score(PROPOSAL, None, made.attempt())
    assert (result.rating.score, result.stored) == (0.75, False)
    assert [name for name, _ in made.happened.of("metric")] == ["scored", "row_lost"]


async def test_a_score_that_fails_is_not_stored() -> None:
    made = fake_sidecar()
    made.hermes.answers = [ModelUnavailable("hermes is gone")]
    with pytest.raises(ModelUnavailable, match="hermes is gone"):
        await made.sidecar.judge.score(PROPOSAL, None, made.attempt())
    assert made.happened.log == []


async def test_a_score_is_stored_with_its_progress() -> None:
    made = fake_sidecar()
    made.hermes.answers = [SURE]
    deadline, request = Deadline.after(60), RequestKey("desk", "k-1")
    made.store.claimed.add(request)
    attempt = Attempt(TaskSet(), deadline, request)
    result = await made.sidecar.judge.score(PROPOSAL, None, attempt)
    (call,) = made.hermes.calls
    assert call.deadline is deadline
    (transaction,) = made.store.commits
    assert transaction.progress is not None
    state = json.loads(transaction.progress.state or "")
    assert state == {
        "proposal_id": str(result.proposal_id),
        "score": 0.75,
        "answer_mass": 1.0,
        "reliable": True,
    }
    # Another attempt neither asks the model nor stores anything.
    again = Attempt(TaskSet(), Deadline.after(60.0), request, state)
    assert await made.sidecar.judge.score(PROPOSAL, None, again) == result
    assert (len(made.hermes.calls), len(made.store.commits)) == (1, 1)


async def test_a_stored_score_is_as_reliable_as_it_was() -> None:
    name = str(uuid.uuid4())
    state = {"proposal_id": name, "score": 0.25, "answer_mass": 0.25, "reliable": False}
    attempt = Attempt(TaskSet(), Deadline.after(60.0), RequestKey("desk", "k-1"), state)
    result = await fake_sidecar().sidecar.judge.score(PROPOSAL, None, attempt)
    assert result == ScoredProposal(
        uuid.UUID(name), Rating(0.25, 0.25, reliable=False), stored=True
    )


async def test_a_score_that_an_older_version_has_stored_counts_as_reliable() -> None:
    name = str(uuid.uuid4())
    state = {"proposal_id": name, "score": 0.25}
    attempt = Attempt(TaskSet(), Deadline.after(60.0), RequestKey("desk", "k-1"), state)
    result = await fake_sidecar().sidecar.judge.score(PROPOSAL, None, attempt)
    assert result == ScoredProposal(uuid.UUID(name), Rating(0.25, None, reliable=True), stored=True)


@pytest.mark.parametrize(
    ("mass", "least", "reliable"),
    [(0.5, 0.5, True), (0.49, 0.5, False), (0.31, 0.3, True), (1.0, 1.0, True), (0.01, 0.0, True)],
)
async def test_a_score_of_little_answer_mass_is_marked(
    mass: float, least: float, reliable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = fake_sidecar(models={"min_answer_mass": least})
    made.hermes.answers = [scores(_4=mass)]
    result = await made.sidecar.judge.score(PROPOSAL, None, made.attempt())
    assert result.rating == pytest.approx((0.4, mass, reliable))
    ((_, row),) = made.happened.of("row")
    assert (row["score"], row["answer_mass"]) == pytest.approx((0.4, mass))
    assert row["score_reliable"] is reliable
    assert made.happened.of("metric") == [("scored", (pytest.approx(0.4), mass, reliable))]
    warned = f"hermes gives the answers 0 to 10 a probability of only {mass:.3f}"
    assert caplog.messages == [] if reliable else [warned]


async def test_a_model_with_prompts_of_its_own_gets_them(tmp_path: Path) -> None:
    own = Prompts(
        system="You judge.", critique_task="Criticise!", score_task="Score!", score_start="Score: "
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text(own.model_dump_json())
    made = fake_sidecar(models={"hermes_path": tmp_path})
    made.hermes.answers = [SURE]
    await made.sidecar.judge.rate(PROPOSAL, PROMPT, Deadline.after(60.0))
    messages = hermes_plugin.build_messages("Score!", PROPOSAL, PROMPT, "You judge.")
    messages.append({"role": "assistant", "content": "Score: "})
    assert made.hermes.requests == [(messages, hermes_plugin.SCORE_ANSWERS)]
    request = made.sidecar.judge.critique_request(PROPOSAL, PROMPT, 300)
    messages = hermes_plugin.build_messages("Criticise!", PROPOSAL, PROMPT, "You judge.")
    assert request.messages == messages


async def test_a_sum_of_probabilities_is_at_most_1() -> None:
    made = fake_sidecar()
    made.hermes.answers = [scores(_5=1.0000001)]
    assert (await made.sidecar.judge.rate(PROPOSAL, None, Deadline.after(60.0))).answer_mass == 1.0


@pytest.mark.parametrize(
    ("context", "fields"), [(None, "proposal: it"), ("c", "proposal: with the context it")]
)
async def test_an_error_names_the_fields_that_the_caller_sent(
    context: str | None, fields: str
) -> None:
    made = fake_sidecar()
    made.hermes.answers = [
        InvalidRequest("it takes 9000 tokens; shorten it", field="prompt", exceeds_context=True)
    ]
    with pytest.raises(InvalidRequest) as caught:
        await made.sidecar.judge.score(PROPOSAL, context, made.attempt())
    assert caught.value.detail == f"{fields} takes 9000 tokens; shorten it"
    assert caught.value.exceeds_context is True
    assert caught.value.__suppress_context__
    assert made.happened.log == []


# The score alone


async def test_a_score_is_read_from_the_probabilities_of_the_answers() -> None:
    made = fake_sidecar()
    made.hermes.answers = [scores(_0=0.1, _10=0.9), scores(_5=0.25)]
    deadline = Deadline.after(60)
    rating = await made.sidecar.judge.rate(PROPOSAL, PROMPT, deadline)
    assert rating == pytest.approx((0.9, 1.0, True))
    rating = await made.sidecar.judge.rate(PROPOSAL, None, deadline)
    assert rating == pytest.approx((0.5, 0.25, False))
    assert [call.deadline for call in made.hermes.calls] == [deadline, deadline]
    assert made.hermes.requests == [
        (hermes_plugin.score_messages(PROPOSAL, PROMPT), hermes_plugin.SCORE_ANSWERS),
        (hermes_plugin.score_messages(PROPOSAL), hermes_plugin.SCORE_ANSWERS),
    ]
    assert [name for name, _ in made.happened.of("metric")] == ["scored", "scored"]
    assert made.happened.of("row") == []


async def test_a_model_that_gives_no_answer_any_probability_is_unavailable() -> None:
    made = fake_sidecar()
    made.hermes.answers = [scores()]
    with pytest.raises(ModelUnavailable) as caught:
        await made.sidecar.judge.rate(PROPOSAL, None, Deadline.after(60.0))
    assert caught.value.detail == (
        "hermes gave no score: none of the answers 0 to 10 has any probability"
    )
    assert caught.value.retry_after == 1
    assert made.happened.log == []


# The critique


@pytest.mark.parametrize(("max_length", "bound"), [(300, 96), (97, 96), (96, 96), (31, 31)])
async def test_a_critique_has_a_bound_of_its_own(max_length: int, bound: int) -> None:
    judge = fake_sidecar().sidecar.judge
    assert judge.critique_request(PROPOSAL, PROMPT, max_length).max_tokens == bound
    judge = fake_sidecar(models={"critique_max_tokens": 200}).sidecar.judge
    assert judge.critique_request(PROPOSAL, PROMPT, max_length).max_tokens == min(max_length, 200)


async def test_without_a_temperature_the_models_own_sampling_gets_a_seed() -> None:
    asked = fake_sidecar().sidecar.judge.critique_request(PROPOSAL, PROMPT, 31)
    assert (asked.temperature, asked.seed) == (None, SEED)
    greedy = fake_sidecar(models={"hermes_temperature": 0.0})
    asked = greedy.sidecar.judge.critique_request(PROPOSAL, PROMPT, 31)
    assert (asked.temperature, asked.seed) == (0.0, None)


async def test_a_critique_ends_at_its_third_sentence_and_stops_hermes() -> None:
    hermes = PausedModel("One. Two. Three. Four", ".")
    made = FakeSidecar(hermes=hermes)
    asked = made.sidecar.judge.critique_request(PROPOSAL, PROMPT, 31)
    found = await text_of(made.sidecar.judge.assess(asked, Deadline.after(60)))
    assert (found.text, found.finish_reason) == ("One. Two. Three.", "stop")
    assert hermes.closed == 1


async def test_a_critique_is_asked_in_its_context() -> None:
    made = fake_sidecar(models={"hermes_temperature": 0.5})
    made.hermes.answers = [CRITIQUE]
    deadline = Deadline.after(60)
    asked = made.sidecar.judge.critique_request(PROPOSAL, PROMPT, 31)
    asking = made.sidecar.judge.assess(asked, deadline)
    assert await text_of(asking) == CRITIQUE
    (call,) = made.hermes.calls
    # Half a critique is none.
    assert (call.deadline, call.allow_partial) == (deadline, False)
    messages = hermes_plugin.build_messages(CRITICISE, PROPOSAL, PROMPT)
    assert call.request == GenerationRequest(messages, 31, None, 0.5, SEED)
    assert made.happened.log == []


async def test_a_critique_streams_and_closing_it_stops_hermes() -> None:
    hermes = PausedModel("Thin. The", " stop.")
    made = FakeSidecar(hermes=hermes)
    asked = made.sidecar.judge.critique_request(PROPOSAL, PROMPT, 31)
    asking = made.sidecar.judge.assess(asked, Deadline.after(60))
    assert await anext(asking) == Delta("Thin.", "paused/fake")
    await asking.aclose()
    assert hermes.closed == 1


async def test_an_error_of_the_model_reaches_the_caller() -> None:
    made = fake_sidecar()
    made.hermes.answers = [QueueFull("full", retry_after=3)] * 2
    with pytest.raises(QueueFull, match="full"):
        await made.sidecar.judge.rate(PROPOSAL, None, Deadline.after(60.0))
    with pytest.raises(QueueFull, match="full"):
        asked = made.sidecar.judge.critique_request(PROPOSAL, PROMPT, 9)
        await text_of(made.sidecar.judge.assess(asked, Deadline.after(60)))
