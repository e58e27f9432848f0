"""Replays of stored proposals, by fake models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.db import Correction
from llm_sidecar.models.base import Adapter, GenerationRequest, Models
from llm_sidecar.models.fake import IDENTITY, FakeModel
from llm_sidecar.proposals import Proposed
from llm_sidecar.services import replay as module
from llm_sidecar.services.provenance import Provenance
from llm_sidecar.services.replay import Difference, Recorded, Report, Result, replay
from llm_sidecar.settings import Settings
from tests.unit.fakes import completion
from tests.unit.services.samples import CRITIQUE, PROMPT, PROPOSAL, SURE

EXAMPLE = Correction("Long XYZ.", PROPOSAL, "t-1", "f-1")
WRITTEN = completion(proposals.dumps(PROPOSAL))
MESSAGES = proposals.build_messages(PROMPT, [proposals.Example("Long XYZ.", PROPOSAL, "f-1")])
ASKED = GenerationRequest(MESSAGES, 300, proposals.GUIDANCE, 0.4, 7)
CRITICISED = GenerationRequest(
    hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, PROPOSAL, PROMPT), 200, None, 0.6, 8
)
TEMPERATURES = {"phi3_temperature": 0.4, "hermes_temperature": 0.6}


def recorded(**changes: Any) -> Recorded:
    """A proposal with one example, its critique and the score 0.75."""
    made = Proposed(PROPOSAL, WRITTEN, (), ASKED, ("f-1",))
    provenance = Provenance.of(made, "desk").with_critique(
        CRITICISED, CRITIQUE, hermes_plugin.PROMPTS
    )
    whole = Recorded(PROMPT, PROPOSAL, CRITIQUE.text, 0.75, provenance, {"f-1": EXAMPLE})
    return replace(whole, **changes)


def models(**answers: Any) -> Models:
    """Models that give the recorded answers, unless `phi3` or `hermes` replace them."""
    return Models(
        FakeModel(*answers.get("phi3", [WRITTEN])),
        FakeModel(*answers.get("hermes", [CRITIQUE, SURE])),
    )


async def run(
    found: Recorded, asked: Models | None = None, **settings: Any
) -> tuple[Report, Models]:
    asked = asked or models()
    return await replay(found, asked, Settings(models=TEMPERATURES | settings)), asked


async def test_the_same_texts_and_score_are_the_same() -> None:
    report, asked = await run(recorded())
    assert report.same
    assert report.results == {
        "proposal": Result(WRITTEN.text, WRITTEN.text),
        "critique": Result(CRITIQUE.text, CRITIQUE.text),
        "score": Result(0.75, 0.75),
    }
    assert report.differences == []
    # The requests are the recorded ones: examples, guidance, temperature, seed and length.
    phi3, hermes = asked
    assert isinstance(phi3, FakeModel)
    assert isinstance(hermes, FakeModel)
    assert phi3.requests == [ASKED]
    score = hermes_plugin.score_messages(PROPOSAL, PROMPT)
    assert hermes.requests == [CRITICISED, (score, hermes_plugin.SCORE_ANSWERS)]


async def test_another_text_differs_and_the_critique_is_still_one_of_the_stored_proposal() -> None:
    other = completion(proposals.dumps(PROPOSAL | {"ticker": "QX"}))
    report, asked = await run(recorded(), models(phi3=[other]))
    assert not report.same
    assert report.results["proposal"] == Result(WRITTEN.text, other.text)
    assert report.results["critique"].same
    assert asked.hermes.requests[0] == CRITICISED  # type: ignore[attr-defined]
    assert report.differences == []


async def test_a_text_that_is_no_proposal_differs() -> None:
    report, _ = await run(recorded(), models(phi3=[completion("no JSON")]))
    assert report.results["proposal"].now == "no JSON"


@pytest.mark.parametrize(("now", "same"), [(0.75009, True), (0.7502, False), (0.7498, False)])
def test_a_score_is_the_same_where_it_is_close(now: float, same: bool) -> None:
    assert Result(0.75, now).same is same


async def test_without_a_critique_hermes_is_not_asked() -> None:
    found = recorded()
    alone = found.provenance.model_copy(update={"critique": None})
    report, asked = await run(replace(found, provenance=alone, critique="", score=None))
    assert list(report.results) == ["proposal"]
    assert asked.hermes.requests == []  # type: ignore[attr-defined]


async def test_without_a_score_none_is_compared() -> None:
    report, _ = await run(recorded(score=None))
    assert list(report.results) == ["proposal", "critique"]


async def test_a_missing_example_is_named_and_its_chat_differs() -> None:
    report, _ = await run(recorded(examples={}))
    assert [difference.fact for difference in report.differences] == ["example f-1", "phi3 chat"]
    assert report.differences[0] == Difference("example f-1", "in the chat", "not stored")


async def test_everything_about_a_model_that_differs_is_named() -> None:
    identity = replace(
        IDENTITY,
        model_files="other",
        tokenizer_files="other",
        runtime="faster",
        versions={"fake": "2.0", "new": "1.0"},
        device="cuda",
        processor="of now",
        threads=2,
    )
    answer = replace(WRITTEN, model="phi3/other", identity=identity)
    report, _ = await run(recorded(), models(phi3=[answer]), phi3_temperature=0.0)
    assert report.same
    assert report.differences == [
        Difference("phi3 model", "phi3/fake", "phi3/other"),
        Difference("phi3 model files", "the model's", "other"),
        Difference("phi3 tokenizer files", "the tokenizer's", "other"),
        Difference("phi3 runtime", "fake", "faster"),
        Difference("phi3 version of fake", "1.0", "2.0"),
        Difference("phi3 device", "cpu", "cuda"),
        Difference("phi3 processor", "of the test", "of now"),
        Difference("phi3 threads", "1", "2"),
        Difference("phi3 temperature", "0.4", "0.0"),
        Difference("phi3 version of new", None, "1.0"),
    ]


async def test_another_version_of_sidecar_and_prompts_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = recorded()
    monkeypatch.setattr(module, "__version__", "9")
    monkeypatch.setattr(module, "proposal_prompt_version", lambda: "new")
    monkeypatch.setattr(module, "critique_prompt_version", lambda prompts: "newer")
    report, _ = await run(found)
    assert [(each.fact, each.now) for each in report.differences] == [
        ("sidecar", "9"),
        ("phi3 prompt version", "new"),
        ("hermes prompt version", "newer"),
    ]


async def test_a_model_without_an_identity_has_no_differences() -> None:
    found = recorded()
    silent = found.provenance.proposal.model_copy(update={"identity": None})
    found = replace(found, provenance=found.provenance.model_copy(update={"proposal": silent}))
    report, _ = await run(found)
    assert report.differences == []


# The recorded adapter


def adapted(name: str) -> Recorded:
    found = recorded()
    proposal = found.provenance.proposal.model_copy(update={"adapter": name})
    return replace(found, provenance=found.provenance.model_copy(update={"proposal": proposal}))


async def test_the_recorded_adapter_is_used_even_if_a_newer_one_is_there(tmp_path: Path) -> None:
    for name in ("20260102", "20260102-dpo", "20260103"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    asked = models(phi3=[replace(WRITTEN, adapter="20260102")])
    report, _ = await run(adapted("20260102"), asked, adapter_dir=tmp_path)
    assert asked.phi3.status().adapter == Adapter(tmp_path / "20260102")
    assert report.differences == []


@pytest.mark.parametrize("name", ["20260102", "../20260102", "latest"])
async def test_an_adapter_that_is_gone_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "20260102-dpo").mkdir()
    (tmp_path / "20260102-dpo" / "adapter_config.json").write_text("{}")
    report, asked = await run(adapted(name), adapter_dir=tmp_path)
    assert asked.phi3.status().adapter is None
    assert report.differences == [Difference("phi3 adapter", name, None)]
