"""Reuse of attention states: a shared prefix, and a critique before its score."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

from benchmarks import models
from benchmarks.models import THREADS
from benchmarks.table import Row
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, GenerationRequest, load_engine


def first_token(rounds: int) -> Iterator[Row]:
    engine = load_engine(models.onnx_model("phi3"), device="cpu", threads=THREADS)
    cold, warm = [], []
    shots: list[proposals.Example] = []
    tokens = 0
    while tokens < 600:
        shots += models.examples(1)
        tokens = len(engine.next_token(proposals.build_messages("", shots)[:-1])[0])
    for number, prompt in enumerate(models.prompts(rounds + 1)):
        # Other examples, which are not cached yet.
        unknown = proposals.Example(f"{number}", shots[0].proposal)
        cold.append(_until_first(engine, proposals.build_messages(prompt, [unknown, *shots])))
        again = proposals.build_messages(prompt + " Now?", [unknown, *shots])
        _until_first(engine, again)
        short = proposals.build_messages("Long ABC?", [unknown, *shots])
        warm.append(_until_first(engine, short))
    ratio = statistics.median(warm[1:]) / statistics.median(cold[1:])
    detail = f"{_median(warm[1:])}, cold {_median(cold[1:])}"
    yield Row(
        f"time to first token after a shared prefix of {tokens} tokens, against a cold one",
        ratio,
        0.1,
        detail,
    )


def _until_first(engine: Engine, messages: list[dict[str, str]]) -> float:
    began = time.perf_counter()
    for delta in engine.stream(GenerationRequest(messages, 8, proposals.GUIDANCE)):
        if delta.completion_tokens:
            break
    return time.perf_counter() - began


def one_score(rounds: int) -> Iterator[Row]:
    engine = load_engine(models.onnx_model("llama"), device="cpu", threads=THREADS)
    seconds: dict[str, list[float]] = {"score": [], "answer": [], "cold score": []}
    differences = []
    for prompt in models.prompts(rounds + 1):
        proposal = models.examples(1)[0].proposal
        score = hermes_plugin.score_messages(proposal, prompt)
        with _timed(seconds["cold score"]):
            first = engine.score_choices(score, hermes_plugin.SCORE_ANSWERS)
        critique = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, proposal, prompt)
        # As in the server, a critique of the proposal precedes the score.
        _write(engine, critique, 30)
        with _timed(seconds["score"]):
            again = engine.score_choices(score, hermes_plugin.SCORE_ANSWERS)
        differences.append(
            abs(hermes_plugin.expected_score(first) - hermes_plugin.expected_score(again))
        )
        _write(engine, critique, 30)
        with _timed(seconds["answer"]):
            _write(engine, score, 10)
    times = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    detail = ", ".join(f"{name} {_median(found[1:])}" for name, found in seconds.items())
    yield Row(
        "one score after its critique, against an answer of ten tokens there",
        times["score"] / times["answer"],
        0.6,
        detail,
    )
    detail = f"{len(differences)} scores"
    yield Row("one score, greatest difference on repeat", max(differences), 1e-6, detail)


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def _write(engine: Engine, messages: list[dict[str, str]], tokens: int) -> None:
    for _ in engine.stream(GenerationRequest(messages, tokens)):
        pass


def _median(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f} ms"
