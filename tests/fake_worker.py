"""The worker's program with an engine that repeats what it is asked, for tests of its protocol.

    python -m tests.fake_worker

Its words are those of the last message, one a step. Some messages make it do something else:
`slow` takes a hundredth of a second a step, `fail` raises, `refuse` refuses the request.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from llm_sidecar.engines import Delta, GenerationRequest, Message
from llm_sidecar.errors import AdapterRejected, InvalidRequest, ModelUnavailable
from llm_sidecar.models.local import worker


class FakeEngine:
    """Repeats the last message, word by word."""

    runtime = "fake"
    device = "cpu"
    context_length = 100

    def __init__(self, adapter: Path | None) -> None:
        self._adapter = adapter

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        """One delta a word."""
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

    def use_adapter(self, folder: Path) -> None:
        """Takes any but the refused one."""
        if folder.name == "refused":
            raise AdapterRejected("it is for another model")
        self._adapter = folder

    def score_choices(
        self, messages: Sequence[Message], choices: Sequence[str], *_: object
    ) -> dict[str, float]:
        """The same for each."""
        if messages[-1]["content"] == "fail":
            raise RuntimeError(messages[-1]["content"])
        return dict.fromkeys(choices, 1 / len(choices))

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
        """Takes one in, unless it is to be refused."""
        if _text(request) == "refuse":
            raise InvalidRequest("prompt: it does not fit")
        self._requests[number] = request, 0

    def remove(self, number: int) -> None:
        """Gives one up."""
        del self._requests[number]

    def step(self) -> list[tuple[int, Delta]]:
        """A word of each."""
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


def load_engine(folder: Path, *, device: str, threads: int, adapter: Path | None) -> FakeEngine:
    """Loads nothing; fails for a folder named `missing`."""
    if folder.name == "missing":
        raise ModelUnavailable("it holds no model")
    return FakeEngine(adapter)


if __name__ == "__main__":
    worker.load_engine = load_engine  # type: ignore[assignment, attr-defined]
    worker.main()
