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
from typing import Final, NamedTuple, Protocol

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import (
    ChoiceScores,
    GenerationRequest,
    Message,
    Question,
    TokenLogprob,
)
from llm_sidecar.errors import AdapterRejected, InvalidRequest
from llm_sidecar.models.completion import Completion, Delta
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.status import Adapter, ModelStatus, ReplicaStatus, ServerStatus, Speed

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
    "ReplicaStatus",
    "ServerStatus",
    "Speed",
    "TokenLogprob",
    "new_seed",
]

_SEED_BITS: Final = 32


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
