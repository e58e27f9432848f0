"""The rows that a run leaves, at each point where it may end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import HermesScoreSchema, OrchestratorRunSchema, ProposalSchema
from llm_sidecar.models.base import Completion, GenerationRequest
from llm_sidecar.models.fake import IDENTITY
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.proposal_run import ProposalRun
from llm_sidecar.services.rows import Row
from llm_sidecar.services.score import Rating

PROPOSAL = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "Nothing to do."}

PROPOSE = GenerationRequest(proposals.build_messages("Long ABC."), 256, proposals.GUIDANCE, 0.5, 7)
CRITICISE = GenerationRequest([{"role": "user", "content": "Criticise."}], 200)


def completion(text: str, model: str) -> Completion:
    return Completion(text, model, "20260102", "stop", 10, 5, identity=IDENTITY)


def run_until(*steps: str) -> ProposalRun:
    run = ProposalRun("Long ABC.", "desk")
    if "proposal" in steps:
        run.proposed(Proposed(PROPOSAL, completion("{}", "phi3/x"), ("ticker",), PROPOSE, ("f1",)))
    if "assessment" in steps:
        run.assessed(completion("Too tight.", "hermes/x"), CRITICISE, hermes_plugin.PROMPTS)
    if "score" in steps:
        run.rated(Rating(0.7, 0.4, reliable=False))
    return run


def of_type(kind: type[Any], rows: list[Row]) -> Any:
    (row,) = [row for row in rows if isinstance(row, kind)]
    return row


def test_a_finished_run_is_a_success_with_proposal_and_score() -> None:
    run = run_until("proposal", "assessment", "score")
    rows = run.rows()
    assert len(rows) == 3
    stored = of_type(OrchestratorRunSchema, rows)
    assert stored.run_id == str(run.transaction_id)
    assert (stored.input_query, stored.status) == ("Long ABC.", "success")
    assert stored.error_message is None
    assert json.loads(stored.final_output) == {
        "proposal": PROPOSAL,
        "assessment": "Too tight.",
        "score": 0.7,
        "answer_mass": 0.4,
        "score_reliable": False,
    }
    proposal = of_type(ProposalSchema, rows)
    assert proposal.transaction_id == str(run.transaction_id)
    assert (proposal.prompt, proposal.proposal) == ("Long ABC.", PROPOSAL)
    assert (proposal.assessment, proposal.score) == ("Too tight.", 0.7)
    assert (proposal.answer_mass, proposal.score_reliable) == (0.4, False)
    assert (proposal.model, proposal.adapter) == ("phi3/x", "20260102")
    assert proposal.grounded == "ticker"
    assert None not in proposal.latencies.model_dump().values()
    score = of_type(HermesScoreSchema, rows)
    assert (score.run_id, score.score) == (str(run.transaction_id), 0.7)
    assert score.rationale == "Too tight."
    assert (score.answer_mass, score.score_reliable) == (0.4, False)


@pytest.mark.parametrize(
    ("steps", "assessment"), [(("proposal",), None), (("proposal", "assessment"), "Too tight.")]
)
def test_a_run_that_ends_before_its_score_is_partial_and_keeps_what_there_is(
    steps: tuple[str, ...], assessment: str | None
) -> None:
    rows = run_until(*steps).rows("hermes is late")
    assert len(rows) == 2
    stored = of_type(OrchestratorRunSchema, rows)
    assert (stored.status, stored.error_message) == ("partial", "hermes is late")
    assert json.loads(stored.final_output) == {
        "proposal": PROPOSAL,
        "assessment": assessment,
        "score": None,
    }
    proposal = of_type(ProposalSchema, rows)
    assert (proposal.assessment, proposal.score) == (assessment or "", None)
    assert (proposal.answer_mass, proposal.score_reliable) == (None, None)
    seconds = proposal.latencies.model_dump()
    assert {name for name in seconds if seconds[name] is not None} == set(steps)


def test_a_run_without_a_proposal_is_an_error_alone() -> None:
    (stored,) = run_until().rows("phi3 is late")
    assert isinstance(stored, OrchestratorRunSchema)
    assert (stored.status, stored.final_output) == ("error", "")
    assert stored.error_message == "phi3 is late"


def test_a_score_without_a_critique_has_no_rationale() -> None:
    score = of_type(HermesScoreSchema, run_until("proposal", "score").rows())
    assert (score.score, score.rationale) == (0.7, "")


@pytest.mark.parametrize(
    "steps", [("proposal",), ("proposal", "assessment"), ("proposal", "assessment", "score")]
)
def test_a_run_goes_on_from_its_state(steps: tuple[str, ...]) -> None:
    run = run_until(*steps)
    resumed = ProposalRun.resumed(run.prompt, json.loads(json.dumps(run.state())))
    assert resumed.transaction_id == run.transaction_id
    assert run.made is not None
    assert resumed.made == Proposed(run.made.proposal, run.made.completion, run.made.ungrounded)
    assert (resumed.assessment, resumed.rating) == (run.assessment, run.rating)
    assert resumed.provenance == run.provenance
    seconds = of_type(ProposalSchema, resumed.rows("late")).latencies
    assert seconds == of_type(ProposalSchema, run.rows("late")).latencies


def test_a_rating_of_an_older_version_is_reliable() -> None:
    state = run_until("proposal", "assessment", "score").state()
    del state["rating"]["reliable"]
    assert ProposalRun.resumed("Long ABC.", state).rating == Rating(0.7, 0.4, reliable=True)


def keys(rows: list[Row]) -> list[str]:
    return [row.as_row()["row_id"] for row in rows]


def test_a_finished_run_has_its_own_id_as_the_key_of_its_rows() -> None:
    run = run_until("proposal", "assessment", "score")
    assert keys(run.rows()) == [run.transaction_id.hex] * 3
    resumed = ProposalRun.resumed(run.prompt, run.state())
    assert keys(resumed.rows()) == keys(run.rows())


def test_a_run_that_ended_early_has_other_keys_each_time() -> None:
    run = run_until("proposal")
    seen = keys(run.rows("late")) + keys(run.rows("late"))
    assert len(set(seen)) == 4
    assert run.transaction_id.hex not in seen
