"""A model for tests: it answers what a test puts into it, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, replace

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Completion,
    Delta,
    GenerationRequest,
    Message,
    ModelStatus,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of a fake model.

    Attributes:
        what: the request of a generation, or the (messages, choices) of scores.
        deadline: of the call, if it had one.
        allow_partial: whether the text so far would have done at the deadline.
    """

    what: object
    deadline: Deadline | None = None
    allow_partial: bool = False


class FakeModel(ChatModel):
    """Answers in order.

        model = FakeModel(completion, ChoiceScores({"0": 1.0}), QueueFull("full"))

    Attributes:
        answers: completions, deltas, scores, or errors to raise; the first is for the next call.
        calls: what it was asked, in order.
        prefixes: what was prefilled, in order.
        state: what `status` returns.
        before_answer: is called before each answer.
    """

    def __init__(self, *answers: Completion | Sequence[Delta] | ChoiceScores | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[Asked] = []
        self.prefixes: list[GenerationRequest] = []
        self.state = ModelStatus()
        self.before_answer: Callable[[], None] = lambda: None

    @property
    def asked(self) -> list[object]:
        """What each call asked for, without its deadline."""
        return [call.what for call in self.calls]

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """The next answer: a completion as two deltas, or the deltas that it consists of."""
        self.calls.append(Asked(request, deadline, allow_partial))
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
        """The next answer."""
        self.calls.append(Asked((messages, choices), deadline))
        answer = self._next()
        assert isinstance(answer, ChoiceScores), "the next answer is not scores"
        return answer

    def status(self) -> ModelStatus:
        """What the test says."""
        return self.state

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Keeps the prefix."""
        self.prefixes.append(prefix)

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Has it from now on."""
        self.state = replace(self.state, adapter=adapter)

    async def start(self, adapter: Adapter | None = None) -> None:
        """Has the adapter from now on."""
        await self.use_adapter(adapter)

    def _next(self) -> Completion | Sequence[Delta] | ChoiceScores:
        self.before_answer()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _deltas(completion: Completion) -> list[Delta]:
    """The completion in two deltas, so that whoever takes one for all of it is noticed."""
    whole = Delta(**asdict(completion))
    half = len(completion.text) // 2
    first = replace(whole, text=completion.text[:half], completion_tokens=0, finish_reason=None)
    return [first, replace(whole, text=completion.text[half:])]
