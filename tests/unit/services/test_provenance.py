"""The provenance of a stored proposal."""

from __future__ import annotations

import pytest

from llm_sidecar import __version__, hermes_plugin, proposals
from llm_sidecar.db import Correction
from llm_sidecar.models.fake import IDENTITY
from llm_sidecar.services import provenance
from llm_sidecar.services.proposal_run import AssessedProposal
from llm_sidecar.services.provenance import Guidance, Provenance
from tests.unit.fakes import FakeSidecar, last_of
from tests.unit.services.samples import PROMPT, PROPOSAL, SEED, UNGROUNDED, WRITTEN, fake_sidecar

EXAMPLE = Correction("Long XYZ.", PROPOSAL, "t-1", "f-1")


async def stored(made: FakeSidecar, api_key: str | None = None) -> Provenance:
    """The stored provenance of one run."""
    await last_of(
        made.sidecar.orchestrator.propose(PROMPT, 300, api_key, made.attempt()), AssessedProposal
    )
    (row,) = [row for name, row in made.happened.of("row") if name == "ProposalSchema"]
    return Provenance.model_validate_json(row["provenance"])


async def test_it_records_models_prompt_examples_sampling_and_key() -> None:
    made = fake_sidecar(models={"phi3_temperature": 0.4})
    made.sidecar.few_shot.corrections = (EXAMPLE,)
    found = await stored(made, "desk")
    assert (found.sidecar, found.api_key, found.examples) == (__version__, "desk", ("f-1",))
    proposal, critique = found.proposal, found.critique
    assert critique is not None
    assert (proposal.label, proposal.adapter) == ("phi3/fake", "20260102")
    assert (critique.label, critique.adapter) == ("hermes/fake", None)
    assert proposal.identity == critique.identity == IDENTITY
    assert (proposal.temperature, proposal.seed, proposal.max_tokens) == (0.4, SEED, 300)
    # The model's own sampling, which its files say.
    assert (critique.temperature, critique.seed, critique.max_tokens) == (None, SEED, 96)
    assert proposal.guidance == Guidance.of(proposals.GUIDANCE)
    assert critique.guidance is None
    assert proposal.prompt_version == provenance.proposal_prompt_version()
    assert critique.prompt_version == provenance.critique_prompt_version(hermes_plugin.PROMPTS)


async def test_without_a_key_and_examples_it_says_none() -> None:
    found = await stored(fake_sidecar())
    assert (found.api_key, found.examples) == (None, ())
    assert (found.proposal.temperature, found.proposal.seed) == (0.0, None)


async def test_a_proposal_without_a_critique_is_recorded_too() -> None:
    made = fake_sidecar()
    made.hermes.answers = [RuntimeError("it breaks")]
    with pytest.raises(RuntimeError):
        await last_of(
            made.sidecar.orchestrator.propose(PROMPT, 300, None, made.attempt()), AssessedProposal
        )
    await made.sidecar._tasks.join()
    (row,) = [row for name, row in made.happened.of("row") if name == "ProposalSchema"]
    found = Provenance.model_validate_json(row["provenance"])
    assert found.proposal.label == "phi3/fake"
    assert found.critique is None


async def test_the_chat_is_recorded_as_a_digest_that_examples_change() -> None:
    plain, again = await stored(fake_sidecar()), await stored(fake_sidecar())
    made = fake_sidecar()
    made.sidecar.few_shot.corrections = (EXAMPLE,)
    other = await stored(made)
    assert plain.proposal.chat == again.proposal.chat != other.proposal.chat
    assert plain.proposal.prompt_version == other.proposal.prompt_version


async def test_after_a_retry_the_guidance_of_the_context_is_recorded() -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, WRITTEN]
    found = (await stored(made)).proposal.guidance
    assert found is not None
    assert (found.kind, found.ticker) == ("grounded", "ABC")
    assert found.text(PROMPT, 300) == made.phi3.requests[1].guidance  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_tokens", [96, 300])
@pytest.mark.parametrize("tickers", [[], ["quiet"], ["XYZ"]])
def test_grounded_guidance_is_made_again_from_prompt_and_ticker(
    tickers: list[str], max_tokens: int
) -> None:
    context = "Long ABC and XYZ from 100. RSI 78."
    text = proposals.grounded_guidance(context, tickers, max_tokens)
    assert text is not None
    assert Guidance.of(text).text(context, max_tokens) == text
    plain = proposals.guidance(max_tokens)
    assert Guidance.of(plain).text(context, max_tokens) == plain


def test_the_version_of_the_proposals_prompt_changes_with_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_proposals = provenance.proposal_prompt_version.__wrapped__
    before = of_proposals()
    monkeypatch.setattr(proposals, "SYSTEM_PROMPT", "Another text.")
    assert of_proposals() != before


@pytest.mark.parametrize("name", ["system", "critique_task", "score_task", "score_start"])
def test_the_version_of_hermes_prompts_changes_with_each_text(name: str) -> None:
    other = hermes_plugin.PROMPTS.model_copy(update={name: "Another text."})
    of_critiques = provenance.critique_prompt_version
    assert of_critiques(other) != of_critiques(hermes_plugin.PROMPTS)


def test_what_a_later_version_records_beside_it_is_ignored() -> None:
    known = Guidance(kind="proposal", version="1")
    assert Guidance.model_validate({**known.model_dump(), "later": 1}) == known
