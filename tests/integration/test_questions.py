"""Several questions to a model: the same answers as for each alone, with less prefill."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from llm_sidecar.engines.base import ChoiceScores, Question, result_of
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.decoding import Decoder
from llm_sidecar.engines.torch import TorchEngine
from llm_sidecar.engines.torch_states import TorchRows
from llm_sidecar.errors import InvalidRequest

CONTEXT = "Long ABC from 100, now 112.5, RSI 81. " * 12


@pytest.fixture(
    scope="module", params=["random_hermes_torch", "random_hermes_onnx", "serial_phi3_onnx"]
)
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_engine(folder, device="cpu")


def question(text: str, *choices: str, context: str = CONTEXT) -> Question:
    messages = [
        {"role": "user", "content": f"{context}\n{text}"},
        {"role": "assistant", "content": '{"answer":'},
    ]
    return Question(messages, choices or ("true", "false"))


QUESTIONS = [
    question("Is it overbought?"),
    question("How good is it?", *map(str, range(10))),
    question("Which of these?", *map(str, range(1, 256))),
    question("And is it a much longer question, so that rows have different lengths?"),
    question("Is it overbought?"),
]


def ask(engine: Engine, questions: Sequence[Question]) -> list[ChoiceScores]:
    return result_of(engine.score_questions(questions))


def test_each_answer_is_that_of_the_question_alone(folder: Path, engine: Engine) -> None:
    found = ask(engine, QUESTIONS)
    assert found[0].probabilities == pytest.approx(found[-1].probabilities, rel=1e-4)
    for one, scores in zip(QUESTIONS, found, strict=True):
        alone = load_engine(folder, device="cpu").score_choices(one.messages, one.choices)
        assert list(scores.probabilities) == list(one.choices)
        assert scores.probabilities == pytest.approx(alone, rel=1e-4, abs=1e-9)
        assert 0.0 < scores.mass <= 1.0


def test_what_the_prompts_share_is_processed_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine, Decoder)
    processed: list[int] = []
    forward = engine.forward

    def counted(tokens: Sequence[int], states: Any) -> Any:
        processed.append(len(tokens))
        return forward(tokens, states)

    monkeypatch.setattr(engine, "forward", counted)
    asked = [question(text, context=f"New. {CONTEXT}") for text in ("One?", "Two?", "And three?")]
    first, *others = ask(engine, asked)
    assert first.prompt_tokens == len(engine.tokenize(asked[0].request)) > 300
    assert first.cached_tokens < 20
    for scores in others:
        assert scores.prompt_tokens - scores.cached_tokens < 40
    # On PyTorch, the ends of the prompts are in a batch.
    assert sum(processed) < first.prompt_tokens + 100
    again = ask(engine, asked[:1])[0]
    assert again.cached_tokens > first.prompt_tokens - 40


def test_a_score_is_computed_in_steps_and_a_stopped_one_leaves_nothing_behind(
    folder: Path, engine: Engine
) -> None:
    long = [question(text, context=CONTEXT * 3) for text in ("One?", "Two?")]
    steps = engine.score_questions(long)
    assert len(engine.tokenize(long[0].request)) > 4 * PREFILL_CHUNK
    for _ in range(3):
        next(steps)
    steps.close()
    expected = ask(load_engine(folder, device="cpu"), long)
    for scores, fresh in zip(ask(engine, long), expected, strict=True):
        assert scores.probabilities == pytest.approx(fresh.probabilities, rel=1e-4)


def test_other_requests_run_between_the_steps(folder: Path, engine: Engine) -> None:
    steps = engine.score_questions(QUESTIONS)
    texts = []
    request = GenerationRequest(hermes_plugin.chat_messages("Why?"), 5)
    scores: list[ChoiceScores] = []

    def run() -> Generator[None]:
        scores.extend((yield from steps))

    for _ in run():
        texts.append("".join(delta.text for delta in engine.stream(request)))
    assert len(texts) >= len(QUESTIONS) - 1
    assert len(set(texts)) == 1
    for one, found in zip(scores, ask(load_engine(folder, device="cpu"), QUESTIONS), strict=True):
        assert one.probabilities == pytest.approx(found.probabilities, rel=1e-4, abs=1e-9)


def test_pytorch_computes_several_questions_in_one_pass(
    random_hermes_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(random_hermes_torch, device="cpu")
    passes: list[int] = []
    forward = TorchRows.forward

    def counted(self: TorchRows, pending: Any) -> Any:
        passes.append(len(pending))
        return forward(self, pending)

    monkeypatch.setattr(TorchRows, "forward", counted)
    ask(engine, [question(f"{number}?", "0", "1") for number in range(10)])
    assert sum(passes) == 10
    assert len(passes) < 5
    passes.clear()
    # A single question is computed as before, so that Hermes' scores stay the same.
    ask(engine, [question("1?", "0", "1")])
    assert passes == []


def test_a_question_that_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="context of"):
        ask(engine, [question("One?"), question("Two?", context="A" * 9000)])
