"""The seam to a language model: everything above `models` asks one only through `ChatModel`.

    async for delta in model.stream(GenerationRequest(messages, max_tokens=256)):
        print(delta.text)
    scores = await model.score_choices(messages, ("0", "1"))

A local worker, a remote server and the fake of the tests are versions of it. To add one, write a
class and let `registry` build it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import FinishReason, GenerationRequest, Message
from llm_sidecar.errors import AdapterRejected

__all__ = [
    "Adapter",
    "ChatModel",
    "ChoiceScores",
    "Completion",
    "Delta",
    "GenerationRequest",
    "Message",
    "ModelStatus",
    "Models",
]

State = Literal["unloaded", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: holds its files; the folder's name is the adapter's name.
    """

    folder: Path

    @property
    def name(self) -> str:
        """`YYYYMMDD` or `YYYYMMDD-dpo`."""
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a generation, and the counts so far.

    Attributes:
        text: what was generated since the delta before.
        model: the label of the model that generates, as in `X-Model`.
        adapter: the name of its adapter, or None.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        finish_reason: of the last delta, and of it alone; `deadline` if the deadline cut the text.
    """

    text: str
    model: str
    adapter: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | Literal["deadline"] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation; the fields are those of its last delta, with the whole text."""

    text: str
    model: str
    adapter: str | None
    finish_reason: FinishReason | Literal["deadline"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """The generation whose deltas these are, the last one included.

        Raises:
            ValueError: the generation has not finished.
        """
        if not deltas or deltas[-1].finish_reason is None:
            raise ValueError("the generation has not finished")
        last = deltas[-1]
        return cls(
            "".join(delta.text for delta in deltas),
            last.model,
            last.adapter,
            deltas[-1].finish_reason,
            last.prompt_tokens,
            last.completion_tokens,
            last.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """How probable each of some answers is.

    Attributes:
        probabilities: by answer: that the assistant's whole turn is this answer. All others are
            possible too, so they do not add up to 1.
    """

    probabilities: Mapping[str, float]

    @property
    def mass(self) -> float:
        """The sum of the probabilities; a small one means that the model would say something
        else."""
        return sum(self.probabilities.values())


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The state of a model.

    Attributes:
        state: `unloaded` until the first request, unless it is preloaded.
        reason: why it failed, or None.
        not_ready: why a request that arrives now would most likely not be served in time; None if
            it would.
        model: its label, or None while it is not loaded.
        adapter: the adapter in use.
        runtime, device: what runs it, and where; None while it is not loaded.
        pid: the process id of its worker, or None.
        restarts: how many times it had to be loaded again after a failure.
        completion_tokens_total: tokens that it has generated.
        requests: those it has admitted and not yet answered.
        queue_length: how many it admits.
        running: those among its requests that it generates now.
    """

    state: State = "ready"
    reason: str | None = None
    not_ready: str | None = None
    model: str | None = None
    adapter: Adapter | None = None
    runtime: str | None = None
    device: str | None = None
    pid: int | None = None
    restarts: int = 0
    completion_tokens_total: int = 0
    requests: int = 0
    queue_length: int = 0
    running: int = 0


class ChatModel(Protocol):
    """A language model that continues chats.

    A class that inherits from this one has to write `stream`, `score_choices` and `status`; the
    other methods do nothing until it overrides them.
    """

    # These methods return explicitly, because mypy treats an empty body as an abstract method.

    def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; closing the generator cancels.

        The last delta, and it alone, has a finish reason.

        Args:
            request: what to generate.
            deadline: by when it has to be finished; None: the model's own limit from now on.
            allow_partial: the generation ends at the deadline, with the finish reason `deadline`,
                instead of failing, if there is any text by then.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        ...

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        """How probable it is that the assistant's whole turn is each of `choices`.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        ...

    def status(self) -> ModelStatus:
        """The state now; reads memory only."""
        ...

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prepares for requests whose messages begin with those of `prefix`, now and at each load.

        Returns once the prefix is in the model's cache, and at once if the model is not loaded.
        """
        return

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Answers the next requests with another adapter, or with none.

        Requests that run end with the adapter that they began with. If the adapter cannot be
        loaded, the one in use stays.

        Raises:
            AdapterRejected: it cannot be loaded; says why.
            ModelUnavailable: the model itself is missing, or is closing.
        """
        if adapter is not None:
            raise AdapterRejected("This model takes no adapters.")

    async def start(self, adapter: Adapter | None = None) -> None:
        """Begins to serve, with this adapter; a model that is loaded lazily loads nothing yet."""
        return

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        return

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, lets running ones end within `grace` seconds, then stops."""
        return


class Models(NamedTuple):
    """The two models of a sidecar: one proposes, one judges."""

    phi3: ChatModel
    hermes: ChatModel
