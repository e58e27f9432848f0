"""The interface of a language model: all code above `models` uses only `ChatModel`.

    async for delta in model.stream(GenerationRequest(messages, max_tokens=256)):
        print(delta.text)
    scores = await model.score_choices(messages, ("0", "1"))

`LocalModel`, `RemoteModel` and the tests' `FakeModel` implement it. To add another kind of model,
write a class and let `registry` build it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import (
    ChoiceScores,
    FinishReason,
    GenerationRequest,
    Message,
    Question,
    TokenLogprob,
)
from llm_sidecar.errors import AdapterRejected, InvalidRequest, ModelUnavailable
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.telemetry.calls import ModelCall

__all__ = [
    "Adapter",
    "ChatModel",
    "ChoiceScores",
    "Completion",
    "Delta",
    "GenerationRequest",
    "Message",
    "ModelIdentity",
    "ModelStatus",
    "Models",
    "Question",
    "RefusedRequest",
    "ServerStatus",
    "Speed",
    "TokenLogprob",
    "new_seed",
]

State = Literal["unloaded", "loading", "ready", "failed"]
_SEED_BITS: Final = 32


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
        text: generated since the previous delta.
        model: the label of the model that generates, as in `X-Model`.
        adapter: the name of its adapter, or None.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        finish_reason: set in the last delta only; `deadline` if the deadline truncated the text.
        identity: the files and runtime of the model; None if unknown.
        logprobs: see `engines.base.Delta`.
        prompt_logprobs: of all prompt tokens, in the first delta.
    """

    text: str
    model: str
    adapter: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | Literal["deadline"] | None = None
    identity: ModelIdentity | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(
        cls,
        call: ModelCall,
        text: str,
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Delta:
        """New text of a call that is served, with the counts so far."""
        assert call.served_by is not None
        return cls(
            text,
            call.served_by,
            call.adapter,
            call.prompt_tokens,
            call.completion_tokens,
            call.cached_tokens,
            call.finish_reason,
            call.identity,
            logprobs,
            prompt_logprobs,
        )


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
    identity: ModelIdentity | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """Joins all deltas of a generation.

        Raises:
            ModelUnavailable: the model ended the stream before the generation had finished.
        """
        if not deltas or deltas[-1].finish_reason is None:
            raise ModelUnavailable(
                "The model ended its answer before it was complete; try again.", retry_after=1
            )
        last = deltas[-1]
        return cls(
            "".join(delta.text for delta in deltas),
            last.model,
            last.adapter,
            deltas[-1].finish_reason,
            last.prompt_tokens,
            last.completion_tokens,
            last.cached_tokens,
            last.identity,
            tuple(token for delta in deltas for token in delta.logprobs),
            tuple(token for delta in deltas for token in delta.prompt_logprobs),
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a model alone on its machine, measured once when it was loaded.

    Attributes:
        prefill, decode: prompt and completion tokens per second, of one request.
    """

    prefill: float
    decode: float

    def seconds(self, prompt_tokens: int, completion_tokens: int) -> float:
        """How long a request takes whose prompt is not cached."""
        return prompt_tokens / self.prefill + completion_tokens / self.decode

    def __str__(self) -> str:
        return f"prefill {self.prefill:.1f} tokens/s, decode {self.decode:.1f} tokens/s"


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The state of a server of a remote model, and its capabilities; None while unknown.

    Attributes:
        url: without credentials.
        state: `resting` while it gets no requests, because it is full or has failed several times;
            `away` while it cannot be reached or used.
        reason: why it is not ready; None if it is.
        model: the name of the model on the server.
        outstanding: number of running requests.
        schema: the strictest way in which it takes a schema; `prompt` for none.
        scores: how its answers are scored.
        top_logprobs: the number of most likely tokens whose log probabilities it returns.
        adapters: whether it loads LoRA adapters.
    """

    url: str
    state: Literal["ready", "resting", "away"]
    reason: str | None
    model: str | None
    outstanding: int
    schema: str | None
    scores: Literal["decisions", "logprobs", "text"] | None
    top_logprobs: int | None
    adapters: bool | None


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
        restarts: how often it was loaded again after a failure.
        completion_tokens_total: tokens that it has generated.
        requests: the number of requests that run or wait.
        queue_length: the maximum of `requests`.
        running: the number of requests that run now.
        speed: measured when the model was loaded; None until then.
        notes: where the sidecar deviates from the model's files, one sentence each.
        servers: of a remote model.
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
    speed: Speed | None = None
    notes: tuple[str, ...] = ()
    servers: tuple[ServerStatus, ...] = ()


class RefusedRequest(InvalidRequest):
    """The server of a remote model refuses what a request contains."""


class ChatModel(Protocol):
    """A language model that continues chats.

    A class that inherits from this one has to write `stream`, `score_choices` and `status`; the
    other methods do nothing until it overrides them.

    Attributes:
        valid_by_construction: whether every generation follows its guidance. If not, proposals are
            checked against it, an invalid one is generated once more, and `/v1` does not stream
            their text.
    """

    valid_by_construction: bool = True

    # These methods return explicitly, because mypy treats an empty body as an abstract method.

    def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates step by step; closing the iterator cancels the request.

        Only the last delta has a finish reason.

        Args:
            request: what to generate.
            deadline: when it must be finished; None for the model's own time limit.
            allow_partial: at the deadline, end the generation with the finish reason `deadline`
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
        """The probability that the assistant's turn begins with each of `choices`.

        A turn that begins with several of them, as "10" does with "1" and "10", counts for the
        longest.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        ...

    async def score_questions(
        self, questions: Sequence[Question], deadline: Deadline | None = None
    ) -> list[ChoiceScores]:
        """`score_choices` for several questions; chats that begin alike share one prefill.

        Raises:
            InvalidRequest, QueueFull, ModelUnavailable, DeadlineExceeded
        """
        return [
            await self.score_choices(question.messages, question.choices, deadline)
            for question in questions
        ]

    def status(self) -> ModelStatus:
        """The current state; does no I/O."""
        ...

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prefills the messages of `prefix`, which later requests begin with, now and at each load.

        Returns once the prefix is in the model's cache, and at once if the model is not loaded.
        """
        return

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Switches to another adapter, or to none, for new requests.

        Running requests keep their adapter. If the adapter cannot be loaded, the one in use stays.

        Raises:
            AdapterRejected: it cannot be loaded; says why.
            ModelUnavailable: the model itself is missing, or is closing.
        """
        if adapter is not None:
            raise AdapterRejected("This model takes no adapters.")

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to serve with this adapter; a lazily loaded model loads nothing yet."""
        return

    def drain(self) -> None:
        """Refuses requests that wait for the model to load, from now on."""
        return

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives running ones `grace` seconds to finish, then stops."""
        return


class Models(NamedTuple):
    """The two models of a sidecar: one proposes, one judges."""

    phi3: ChatModel
    hermes: ChatModel


def new_seed(temperature: float | None) -> int | None:
    """A random seed for a request with this temperature; None for a greedy one."""
    return None if temperature == 0.0 else secrets.randbits(_SEED_BITS)
