"""Which of several workers gets a request."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from llm_sidecar.engines.base import GenerationRequest
from llm_sidecar.models.local.process import WorkerProcess

_PROMPTS: Final = 8
"""Prompts of a worker that are compared; its engine caches about as many."""


@dataclass(slots=True)
class _Recent:
    """The latest prompts of a worker, and the number of its latest request."""

    prompts: deque[str] = field(default_factory=lambda: deque(maxlen=_PROMPTS))
    number: int = 0

    def shared(self, prompt: str) -> int:
        """Characters that the prompt shares with the most similar one."""
        return max((common_prefix(prompt, other) for other in self.prompts), default=0)


class WorkerChoice:
    """Chooses the least busy worker, unless another one has most of the prompt in its cache."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._recent: WeakKeyDictionary[WorkerProcess, _Recent] = WeakKeyDictionary()

    def choose(self, workers: Sequence[WorkerProcess], request: GenerationRequest) -> WorkerProcess:
        """The worker for a request; remembers the choice.

        A critique and its score share a prompt of which the score adds only the last line. So a
        worker with one request more than the least busy one is chosen if that saves the prefill of
        half the prompt. An idle worker is always better than a busy one.
        """
        if len(workers) == 1:
            return workers[0]
        prompt = _text(request)
        recent = {worker: self._recent.setdefault(worker, _Recent()) for worker in workers}
        shared = {worker: recent[worker].shared(prompt) for worker in workers}
        least = min(workers, key=lambda one: (len(one.calls), recent[one].number))
        most_calls = len(least.calls) + bool(least.calls)
        near = [one for one in workers if len(one.calls) <= most_calls and _has_room(one)]
        best = max(near, key=lambda one: shared[one], default=least)
        chosen = best if shared[best] - shared[least] > len(prompt) / 2 else least
        recent[chosen].number = next(self._numbers)
        recent[chosen].prompts.append(prompt)
        return chosen


def common_prefix(one: str, other: str) -> int:
    """The number of characters with which both texts begin alike; fast for long texts."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def _has_room(worker: WorkerProcess) -> bool:
    """Whether another request of a worker begins at once."""
    assert worker.ready is not None
    return len(worker.calls) < worker.ready.capacity


def _text(request: GenerationRequest) -> str:
    """A prompt as text, without its template; a prompt of tokens has none."""
    if request.text is not None:
        return request.text
    return "\0".join(part for turn in request.messages for part in (turn["role"], turn["content"]))
