"""The worker's program with an engine that repeats its prompt, for tests of the protocol.

    python -m tests.fake_worker

It generates the words of the last message, one a step. Some messages change what it does: `slow`
takes a hundredth of a second a step, `fail` raises, `refuse` refuses the request, `nan` has scores
that are not numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_sidecar.engines import Delta, GenerationRequest, Message
from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.local import warm_up, worker


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

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        """One delta a word; fails if the folder is `damaged`."""
        if self._folder.name == "damaged":
            raise RuntimeError("fail")
        batch = FakeBatch()
        batch.add(0, request)
        while batch:
            yield from (delta for _, delta in batch.step())

    def batch(self) -> FakeBatch:
        """An empty one."""
        return FakeBatch()

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        """Two steps, unless it fails."""
        yield
        if _text(request) == "fail":
            raise RuntimeError(_text(request))
        yield

    def decode_steps(self, count: int) -> Generator[None]:
        """Takes no time."""
        yield from [None] * (1 + count)

    def score_choices(
        self, messages: Sequence[Message], answers: Sequence[str], *_: object
    ) -> dict[str, float]:
        """The same for each."""
        if messages[-1]["content"] == "fail":
            raise RuntimeError(messages[-1]["content"])
        share = math.nan if messages[-1]["content"] == "nan" else 1 / len(answers)
        return dict.fromkeys(answers, share)

    def tokenize(self, request: GenerationRequest, *_: object) -> list[int]:
        """A token a word."""
        return list(range(len(_text(request).split())))


class FakeBatch:
    """At most two requests at a time."""

    capacity = 2

    def __init__(self) -> None:
        self._requests: dict[int, tuple[GenerationRequest, int]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, number: int, request: GenerationRequest) -> None:
        """Adds a request, or refuses it."""
        if _text(request) == "refuse":
            raise InvalidRequest("prompt: it does not fit")
        self._requests[number] = request, 0

    def remove(self, number: int) -> None:
        """Removes a request."""
        del self._requests[number]

    def step(self) -> list[tuple[int, Delta]]:
        """One word for each request."""
        deltas = []
        for number, (request, done) in list(self._requests.items()):
            text = _text(request)
            if text == "fail":
                self._requests.clear()
                raise RuntimeError(text)
            if text.startswith("slow"):
                time.sleep(0.01)
            words = text.split()[: request.max_tokens]
            over = done + 1 == len(words)
            stop = len(words) == len(text.split())
            reason: Any = None if not over else "stop" if stop else "length"
            deltas.append(
                (number, Delta(f"{words[done]} ", len(text), done + 1, 1, finish_reason=reason))
            )
            self._requests[number] = request, done + 1
            if over:
                del self._requests[number]
        return deltas


def _text(request: GenerationRequest) -> str:
    return request.messages[-1]["content"]


def load_engine(folder: Path, **options: object) -> FakeEngine:
    """Loads nothing; fails if the folder is `missing`."""
    if folder.name == "missing":
        raise ModelUnavailable("it holds no model")
    return FakeEngine(folder)


if __name__ == "__main__":
    warm_up.load_engine = load_engine  # type: ignore[assignment, attr-defined]
    worker.main()
