"""A model for tests: it returns prepared answers and records its calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Completion,
    Delta,
    GenerationRequest,
    Message,
    ModelIdentity,
    ModelStatus,
)

IDENTITY: Final = ModelIdentity(
    model_files="the model's",
    tokenizer_files="the tokenizer's",
    runtime="fake",
    versions={"fake": "1.0"},
    device="cpu",
    processor="of the test",
    threads=1,
)
"""The identity of each fake model."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a fake model.

    Attributes:
        request: of a generation; (messages, choices) of `score_choices`.
        deadline: of the call, or None.
        allow_partial: as passed to `stream`.
    """

    request: object
    deadline: Deadline | None = None
    allow_partial: bool = False


class FakeModel(ChatModel):
    """Returns its answers in order.

        model = FakeModel(completion, ChoiceScores({"0": 1.0}), QueueFull("full"))

    Attributes:
        answers: completions, deltas, scores, or errors to raise; the next call takes the first.
        calls: the calls so far, in order.
        prefixes: the prefilled prefixes, in order.
        state: what `status` returns.
        before_answer: is called before each answer.
    """

    def __init__(self, *answers: Completion | Sequence[Delta] | ChoiceScores | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[Call] = []
        self.prefixes: list[GenerationRequest] = []
        self.state = ModelStatus()
        self.before_answer: Callable[[], None] = lambda: None

    @property
    def requests(self) -> list[object]:
        """The request of each call, without its deadline."""
        return [call.request for call in self.calls]

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Streams the next answer: prepared deltas, or a completion as two deltas."""
        self.calls.append(Call(request, deadline, allow_partial))
        answer = self._next()
        if isinstance(answer, Completion):
            answer = _deltas(answer)
        assert not isinstance(answer, ChoiceScores), "the next answer is not a generation"
        for delta in answer:
            yield delta

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        """Returns the next answer."""
        self.calls.append(Call((messages, choices), deadline))
        answer = self._next()
        assert isinstance(answer, ChoiceScores), "the next answer is not scores"
        return answer

    def status(self) -> ModelStatus:
        """Returns `state`."""
        return self.state

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Records the prefix."""
        self.prefixes.append(prefix)

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Switches to this adapter."""
        self.state = replace(self.state, adapter=adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts with this adapter."""
        await self.use_adapter(adapter)

    def _next(self) -> Completion | Sequence[Delta] | ChoiceScores:
        self.before_answer()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _deltas(completion: Completion) -> list[Delta]:
    """Splits the completion into two deltas, so that code which reads only one of them fails."""
    whole = Delta(**{field.name: getattr(completion, field.name) for field in fields(completion)})
    whole = replace(whole, identity=completion.identity or IDENTITY)
    half, tokens = len(completion.text) // 2, len(completion.logprobs) // 2
    first = replace(
        whole,
        text=completion.text[:half],
        completion_tokens=0,
        finish_reason=None,
        logprobs=completion.logprobs[:tokens],
    )
    second = replace(
        whole,
        text=completion.text[half:],
        logprobs=completion.logprobs[tokens:],
        prompt_logprobs=(),
    )
    return [first, second]
