"""Stand-ins at the seams: a model that answers what a test tells it to, a module's fresh copy."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import cast

from llm_sidecar.engines import GenerationRequest, Message
from llm_sidecar.model_host import Completion, ModelHost


def completion(text: str, **changes: object) -> Completion:
    """A finished generation by `phi3/fake`, unless the changes say otherwise."""
    values: dict[str, object] = {
        "model": "phi3/fake",
        "adapter": None,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 9,
    }
    return Completion(text=text, **(values | changes))  # type: ignore[arg-type]


class FakeHost:
    """A model that answers in order what it was given, and keeps what it was asked.

    Attributes:
        answers: completions, probabilities, or errors to raise; the first is for the next request.
        asked: generation requests, and the (messages, answers) of scores.
    """

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []

    async def generate(self, request: GenerationRequest, *_: object, **__: object) -> Completion:
        self.asked.append(request)
        return cast(Completion, self._next())

    async def answer_probabilities(
        self, messages: Sequence[Message], answers: Sequence[str], *_: object, **__: object
    ) -> dict[str, float]:
        self.asked.append((messages, answers))
        return cast(dict[str, float], self._next())

    def _next(self) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def host(self) -> ModelHost:
        """Itself, as those that ask models know one."""
        return cast(ModelHost, self)


def fresh(module: ModuleType) -> ModuleType:
    """The module executed once more: what it computes while it is imported is computed now.

    The one that everybody imports stays as it is.
    """
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert sys.modules[module.__name__] is module
    return again
