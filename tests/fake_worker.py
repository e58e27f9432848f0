"""The worker's program with an engine that repeats its prompt, for tests of the protocol.

    python -m tests.fake_worker

It generates the words of the last message, one a step. Some messages change what it does: `slow`
takes a hundredth of a second a step, `fail` raises, `refuse` refuses the request, `alone` fails it
alone, `nan` has scores that are not numbers. The word `adapter` becomes the name of the adapter in
use, or `none`. `FAKE_STEP_SECONDS` is the time of each step of all
requests together, and `FAKE_CAPACITY` the number of requests at a time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_sidecar.engines import Delta, GenerationRequest
from llm_sidecar.engines.base import ChoiceScores, Question, TokenLogprob, unless_failed
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.local import warm_up, worker

_STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0"))


class FakeEngine:
    """Repeats the last message, word by word."""

    runtime = "fake"
    device = "cpu"
    context_length = 100
    notes = ()
    scores_in_parallel = False
    versions: Mapping[str, str] = {"fake": "1.0"}
    dtype = None
    prefill_folder = None

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self._folder = folder
        self._adapter = "none" if adapter is None else adapter.name

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        """One delta a word; fails if the folder is `damaged`."""
        if self._folder.name == "damaged":
            raise RuntimeError("fail")
        batch = self.batch()
        batch.add(0, request)
        while batch:
            yield from (unless_failed(result) for _, result in batch.step())

    def batch(self) -> FakeBatch:
        """An empty one."""
        return FakeBatch(self._adapter)

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        """Two steps, unless it fails."""
        yield
        if _text(request) == "fail":
            raise RuntimeError(_text(request))
        yield

    def decode_steps(self, count: int) -> Generator[None]:
        """Takes no time."""
        yield from [None] * (1 + count)

    def score_questions(
        self, questions: Sequence[Question]
    ) -> Generator[None, None, list[ChoiceScores]]:
        """The same probability for each choice; one question in each step."""
        scores: list[ChoiceScores] = []
        for messages, choices, tokens in questions:
            if scores:
                yield
            text = messages[-1]["content"]
            if text == "fail":
                raise RuntimeError(text)
            if text == "slow":
                time.sleep(0.01)
            share = math.nan if text == "nan" else 1 / len(choices)
            scores.append(ChoiceScores(dict.fromkeys(choices, share), len(tokens or ())))
        return scores

    def tokenize(self, request: GenerationRequest, *_: object) -> list[int]:
        """A token a word."""
        return list(range(len(_text(request).split())))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The numbers of the tokens."""
        return " ".join(map(str, tokens))


class FakeBatch:
    """At most two requests at a time, unless the environment says otherwise."""

    capacity = int(os.environ.get("FAKE_CAPACITY", "2"))

    def __init__(self, adapter: str) -> None:
        self._adapter = adapter
        self._requests: dict[int, tuple[GenerationRequest, int]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, number: int, request: GenerationRequest) -> None:
        """Adds a request, or refuses it."""
        if _text(request) == "refuse":
            raise InvalidRequest("it does not fit", field="prompt")
        self._requests[number] = request, 0

    def remove(self, number: int) -> None:
        """Removes a request."""
        del self._requests[number]

    def step(self) -> list[tuple[int, Delta | Exception]]:
        """One word for each request, with its log probability if requested. The prompt has one log
        probability for each character."""
        deltas: list[tuple[int, Delta | Exception]] = []
        time.sleep(_STEP_SECONDS)
        for number, (request, done) in list(self._requests.items()):
            text = _text(request)
            if text == "fail":
                self._requests.clear()
                raise RuntimeError(text)
            if text == "alone":
                del self._requests[number]
                deltas.append((number, InvalidRequest("it is too complex", field="schema")))
                continue
            if text.startswith("slow"):
                time.sleep(0.01)
            words = text.split()[: request.max_tokens]
            over = done + 1 == len(words)
            stop = len(words) == len(text.split())
            reason: Any = None if not over else "stop" if stop else "length"
            word = self._adapter if words[done] == "adapter" else words[done]
            delta = Delta(f"{word} ", len(text), done + 1, 1, finish_reason=reason)
            if request.logprobs is not None:
                delta = replace(delta, logprobs=(TokenLogprob(done, words[done].encode(), -0.5),))
            if request.prompt_logprobs is not None and not done:
                read = tuple(TokenLogprob(ord(one), one.encode(), -1.5) for one in text)
                deltas.append((number, Delta("", len(text), 0, 1, prompt_logprobs=read)))
            deltas.append((number, delta))
            self._requests[number] = request, done + 1
            if over:
                del self._requests[number]
        return deltas


def _text(request: GenerationRequest) -> str:
    return request.messages[-1]["content"]


def load_engine(folder: Path, **options: object) -> FakeEngine:
    """Loads nothing; fails if the folder is `missing`, or if there is no folder of the adapter."""
    if folder.name == "missing":
        raise ModelUnavailable("it holds no model")
    adapter = options.get("adapter")
    if not isinstance(adapter, Path):
        return FakeEngine(folder)
    if not adapter.is_dir():
        raise ModelUnavailable("its adapter is missing")
    return FakeEngine(folder, adapter)


if __name__ == "__main__":
    warm_up.load_engine = load_engine  # type: ignore[assignment, attr-defined]
    worker.main()
