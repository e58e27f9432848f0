"""The exact prompts for a critique and a score, and the score in Hermes' answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import hermes_plugin, loader
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import ChoiceScores, GenerationRequest, Message
from llm_sidecar.models.prompts import Prompts
from llm_sidecar.settings import Settings

PROPOSAL = {"ticker": "ABC", "action": "adjust", "new_stop_pct": 1.5, "rationale": "Größe zählt."}
CONTEXT = "Long ABC from 100,\nnow 112.5."
SYSTEM = {
    "role": "system",
    "content": (
        "You are Hermes, the risk officer of a trading desk. You judge trade proposals by their "
        "reward to risk, their stop and whether the rationale follows from the market context. A "
        "score of 0 rejects, 10 is excellent."
    ),
}
WRITTEN = (
    '{"ticker":"ABC","action":"adjust","new_stop_pct":1.5,'
    '"rationale":"Gr\\u00f6\\u00dfe z\\u00e4hlt."}'
)
ANSWERS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10")
CRITICISE = "Criticise this proposal in at most three sentences."
SCORE = "Score it from 0 to 10, a number only."
BEGUN = {"role": "assistant", "content": '{"score":'}


def in_context(task: str) -> list[dict[str, str]]:
    content = f"Market context:\n{CONTEXT}\n\nProposal:\n{WRITTEN}\n\n{task}"
    return [SYSTEM, {"role": "user", "content": content}]


def alone(task: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": f"Proposal:\n{WRITTEN}\n\n{task}"}]


def probabilities(**found: float) -> dict[str, float]:
    """Of all eleven answers: `_7=0.5` is that of 7, and those that are not named have none."""
    return dict.fromkeys(ANSWERS, 0.0) | {name[1:]: value for name, value in found.items()}


# What Hermes reads


def test_the_messages_hold_context_proposal_and_task() -> None:
    assert hermes_plugin.build_messages("Do it.", PROPOSAL, CONTEXT) == in_context("Do it.")
    assert hermes_plugin.build_messages("Do it.", PROPOSAL) == alone("Do it.")


def test_a_score_chat_starts_the_answer() -> None:
    assert hermes_plugin.score_messages(PROPOSAL, CONTEXT) == [*in_context(SCORE), BEGUN]
    assert hermes_plugin.score_messages(PROPOSAL) == [*alone(SCORE), BEGUN]
    silent = hermes_plugin.PROMPTS.model_copy(update={"score_start": ""})
    assert hermes_plugin.score_messages(PROPOSAL, CONTEXT, silent) == in_context(SCORE)


def test_an_empty_context_is_one() -> None:
    (_, turn) = hermes_plugin.build_messages("Do it.", {}, "")
    assert turn["content"] == "Market context:\n\n\nProposal:\n{}\n\nDo it."


def test_a_free_question_stands_alone() -> None:
    asked = hermes_plugin.chat_messages("What now?")
    assert asked == [SYSTEM, {"role": "user", "content": "What now?"}]


def test_the_tasks_are_these() -> None:
    assert (hermes_plugin.CRITIQUE_TASK, hermes_plugin.SCORE_TASK) == (CRITICISE, SCORE)


def test_the_answers_are_the_numbers_from_0_to_10() -> None:
    assert hermes_plugin.SCORE_ANSWERS == ANSWERS


def test_the_prefix_is_what_every_question_begins_with() -> None:
    prefix = hermes_plugin.prefix()
    assert prefix == GenerationRequest([SYSTEM], 1, None, 0.0, None)
    assert hermes_plugin.chat_messages("What now?")[:1] == prefix.messages
    assert hermes_plugin.build_messages("Do it.", PROPOSAL, CONTEXT)[:1] == prefix.messages


# The score


@pytest.mark.parametrize(
    ("found", "score"),
    [
        (probabilities(_0=1.0), 0.0),
        (probabilities(_10=1.0), 1.0),
        (probabilities(_7=1.0), 0.7),
        (probabilities(_0=0.1, _10=0.9), 0.9),
        (probabilities(_2=0.25, _4=0.75), 0.35),
        # They need not add up to one.
        (probabilities(_6=0.001), 0.6),
        (probabilities(_1=0.2, _2=0.2, _3=0.2), 0.2),
        (dict.fromkeys(ANSWERS, 1 / 11), 0.5),
        # Other answers do not count.
        (probabilities(_10=0.5) | {"eleven": 0.5}, 1.0),
    ],
)
def test_the_score_is_the_mean_of_the_answers_divided_by_ten(
    found: dict[str, float], score: float
) -> None:
    assert hermes_plugin.expected_score(found) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_without_any_probability_there_is_no_score(nothing: float) -> None:
    with pytest.raises(ValueError, match=r"^none of the answers 0 to 10 has any probability$"):
        hermes_plugin.expected_score(dict.fromkeys(ANSWERS, nothing))


def test_a_model_that_gives_no_answer_any_probability_is_unavailable() -> None:
    with pytest.raises(ModelUnavailable) as caught:
        hermes_plugin.read_score(ChoiceScores(probabilities()))
    assert caught.value.detail == (
        "hermes gave no score: none of the answers 0 to 10 has any probability"
    )
    assert caught.value.retry_after == 1


def test_a_model_that_leaves_an_answer_out_is_unavailable() -> None:
    found = probabilities(_5=1.0)
    del found["3"], found["10"]
    with pytest.raises(ModelUnavailable) as caught:
        hermes_plugin.read_score(ChoiceScores(found))
    assert caught.value.detail == ("hermes gave no score: the answers 3, 10 have no probabilities")
    assert caught.value.retry_after == 1


def test_a_score_of_little_mass_is_not_reliable_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert hermes_plugin.is_reliable(ChoiceScores(probabilities(_4=0.3, _5=0.1)), 0.5) is False
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "hermes gives the answers 0 to 10 a probability of only 0.400")
    ]
    caplog.clear()
    assert hermes_plugin.is_reliable(ChoiceScores(probabilities(_4=0.25, _5=0.25)), 0.5) is True
    assert hermes_plugin.is_reliable(ChoiceScores(probabilities(_4=0.1)), 0.1) is True
    assert caplog.messages == []


# The prompts


def test_a_model_has_the_prompts_in_its_folder_and_any_other_the_sidecars_own(
    tmp_path: Path,
) -> None:
    settings = Settings(models={"hermes_path": tmp_path})
    assert hermes_plugin.prompts_for(settings) == hermes_plugin.PROMPTS
    (tmp_path / "config.json").write_text("{}")
    assert hermes_plugin.prompts_for(settings) == hermes_plugin.PROMPTS
    own = Prompts(system="a", critique_task="b", score_task="c", score_start="d")
    (tmp_path / "prompts.json").write_text(own.model_dump_json())
    assert hermes_plugin.prompts_for(settings) == own


def test_the_demo_model_keeps_the_prompts_that_it_was_trained_on() -> None:
    demo = hermes_plugin.prompts_for(Settings(models={"demo": True}))
    assert demo == Prompts(
        system=SYSTEM["content"],
        critique_task="Criticise this proposal in at most three sentences.",
        score_task="Score it from 0 to 10, a number only.",
        score_start="",
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "{", '{"system": "a", "critique_task": "b"}'),
        '{"system": "a", "critique_task": "b", "score_task": "c"}',
        '{"system": "a", "critique_task": "b", "score_task": "", "score_start": "d"}',
        '{"system": "a", "critique_task": "b", "score_task": "c", "score_start": "", "more": "d"}',
    ],
)
def test_a_model_with_broken_prompts_does_not_load(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ModelUnavailable) as caught:
        loader.locate_hermes(Settings(models={"hermes_path": tmp_path}))
    assert caught.value.detail == (
        f"{tmp_path}/prompts.json must contain exactly the texts system, critique_task, "
        "score_task, score_start; "
        "correct it, or remove it to use the sidecar's own prompts"
    )


# For scripts


class FakeEngine:
    """Hermes in this process."""

    def __init__(self, answer: dict[str, float] | Exception) -> None:
        self._answer = answer
        self.requests: list[tuple[Sequence[Message], Sequence[str]]] = []

    def score_choices(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> dict[str, float]:
        self.requests.append((messages, answers))
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("score", [0.0, 0.3, 0.8, 1.0])
def test_a_script_gets_the_score_of_the_loaded_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, score: float
) -> None:
    engine = FakeEngine(probabilities(_0=1 - score, _10=score))
    monkeypatch.setattr(loader, "get_hermes_engine", lambda: engine)
    assert hermes_plugin.score_with_hermes(PROPOSAL, CONTEXT) == pytest.approx(score)
    assert hermes_plugin.score_with_hermes(PROPOSAL) == pytest.approx(score)
    assert engine.requests == [
        ([*in_context(SCORE), BEGUN], ANSWERS),
        ([*alone(SCORE), BEGUN], ANSWERS),
    ]
    assert caplog.messages == []


def test_a_script_gets_the_score_for_the_models_own_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = Prompts(system="a", critique_task="b", score_task="c", score_start="d")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text(own.model_dump_json())
    monkeypatch.setenv("HERMES_MODEL_PATH", str(tmp_path))
    engine = FakeEngine(probabilities(_5=1.0))
    monkeypatch.setattr(loader, "get_hermes_engine", lambda: engine)
    assert hermes_plugin.score_with_hermes({}) == 0.5
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "Proposal:\n{}\n\nc"},
        {"role": "assistant", "content": "d"},
    ]
    assert engine.requests == [(messages, ANSWERS)]


@pytest.mark.parametrize(
    ("failure", "logged"),
    [
        (ModelUnavailable("it is not there"), "scoring failed: it is not there"),
        (RuntimeError("'Größe zählt' does not fit"), "scoring failed: RuntimeError"),
        (
            probabilities(),
            "scoring failed: hermes gave no score: none of the answers 0 to 10 has any probability",
        ),
    ],
)
def test_a_script_gets_minus_one_where_scoring_fails_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Any,
    logged: str,
) -> None:
    monkeypatch.setattr(loader, "get_hermes_engine", lambda: FakeEngine(failure))
    assert hermes_plugin.score_with_hermes(PROPOSAL) == -1.0
    said = [r for r in caplog.records if r.levelname == "ERROR"]
    assert [record.getMessage() for record in said] == [logged]


def test_a_script_gets_minus_one_where_the_model_does_not_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ModelUnavailable("set HERMES_MODEL_PATH")

    monkeypatch.setattr(loader, "get_hermes_engine", fail)
    assert hermes_plugin.score_with_hermes(PROPOSAL) == -1.0
    assert caplog.messages == ["scoring failed: set HERMES_MODEL_PATH"]


@pytest.mark.parametrize(
    ("proposal", "context", "logged"),
    [
        (
            {"rationale": "a\x00b"},
            None,
            "scoring failed: proposal.*: Text should have no control characters but tab, newline "
            "and carriage return; its character 2 is one",
        ),
        (
            PROPOSAL,
            "x" * 101,
            "scoring failed: context: Text is too long; MAX_PROMPT_CHARS takes 100 characters",
        ),
    ],
)
def test_a_script_cannot_send_what_is_no_text_or_too_long(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    proposal: dict[str, Any],
    context: str | None,
    logged: str,
) -> None:
    monkeypatch.setenv("MAX_PROMPT_CHARS", "100")
    engine = FakeEngine(probabilities(_5=1.0))
    monkeypatch.setattr(loader, "get_hermes_engine", lambda: engine)
    assert hermes_plugin.score_with_hermes(proposal, context) == -1.0
    assert caplog.messages == [logged]
    assert engine.requests == []
    assert hermes_plugin.score_with_hermes({"rationale": "fine"}, "x" * 100) == 0.5
