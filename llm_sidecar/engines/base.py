"""The interface of engines, and helpers that they share.

An engine is synchronous and runs in its own worker process.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llm_sidecar.errors import InvalidRequest

Message = dict[str, str]
"""One chat turn: `{"role": "system" | "user" | "assistant", "content": text}`."""
FinishReason = Literal["stop", "length"]

PROBE: Final[Sequence[Message]] = ({"role": "user", "content": "Long ABC. What now?"},)
"""A chat that a model must answer before an adapter is used."""

ANSWER_TOKENS: Final = 2
"""Maximum number of tokens of a choice in `score_choices`."""

PREFILL_CHUNK: Final = 256
"""Prompt tokens per prefill step; a request can be cancelled between two steps."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        messages: the chat, oldest first.
        max_tokens: maximum number of completion tokens.
        guidance: JSON schema text (llguidance dialect) that the completion must follow, or None.
        temperature: 0 is greedy; otherwise it divides the logits before sampling.
        seed: makes sampling repeatable.
        tokens: of the messages, as `Engine.tokenize` returns them; None to tokenize them later.
    """

    messages: Sequence[Message]
    max_tokens: int
    guidance: str | None = None
    temperature: float = 0.0
    seed: int | None = None
    tokens: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a generation: new text, and the counts so far.

    Attributes:
        cached_tokens: prompt tokens whose states were cached.
        finish_reason: set in the last delta only.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """A loaded language model.

    Attributes:
        runtime: package that runs it.
        device: `cpu` or `cuda`.
        context_length: maximum number of prompt and completion tokens of a request.
    """

    runtime: str
    device: str
    context_length: int

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        """The tokens of a request's messages: `request.tokens` if given, otherwise encoded now.

        It may be called from another thread while the engine generates.

        Args:
            header: whether the header of the assistant's turn follows; `prefill` takes tokens
                without it.

        Raises:
            InvalidRequest: prompt and completion do not fit the context, or the messages hold
                something that cannot be encoded.
            ModelUnavailable: the model's chat template refuses the chat.
        """
        ...

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        """Generates step by step; closing the iterator stops the generation.

        Prefill skips the tokens that the prompt shares with an earlier one.

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...

    def batch(self) -> Batch:
        """Creates an empty batch. An engine runs one batch at a time."""
        ...

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        """Processes messages that later prompts begin with, step by step, and keeps their states.

        Args:
            request: its messages are the first turns; the rest is as in the later requests.

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        """The prompt's tokens, and the probability of each next token, (vocabulary,).

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...

    def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """The probability of each of `choices` as the assistant's turn, from one prefill.

        Args:
            tokens: of the messages, as `tokenize` returns them for `ANSWER_TOKENS` new tokens;
                None to tokenize them here.

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...


class Batch(Protocol):
    """Requests that are generated at the same time; numbers identify them.

    Requests join and leave between steps, so a new one does not wait for the others to finish
    (continuous batching: Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based
    Generative Models").

    Attributes:
        capacity: maximum number of requests.
    """

    capacity: int

    def __len__(self) -> int: ...

    def add(self, number: int, request: GenerationRequest) -> None:
        """Adds a request; the batch must be below its capacity.

        Raises:
            InvalidRequest, ModelUnavailable: as in `Engine.tokenize`, if the request has no tokens.
        """
        ...

    def remove(self, number: int) -> None:
        """Cancels a request."""
        ...

    def step(self) -> list[tuple[int, Delta]]:
        """One delta per active request; requests with a finish reason leave the batch.

        Raises:
            Exception: the runtime failed; all requests have failed, and the batch is empty.
        """
        ...


def check_context(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raises InvalidRequest unless prompt and completion fit."""
    if prompt_tokens + max_tokens <= context_length:
        return
    if prompt_tokens + ANSWER_TOKENS > context_length:
        # A smaller max_length does not help here, and a score request has none.
        raise InvalidRequest(
            f"prompt: it takes {prompt_tokens} tokens, which is too many for the model's context "
            f"of {context_length}; shorten it"
        )
    raise InvalidRequest(
        f"prompt: it takes {prompt_tokens} tokens, which with max_length is more than the model's "
        f"context of {context_length}; shorten one of them"
    )


def prefill_steps(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Splits the tokens of a prompt into the slices of its prefill.

    Avoids one-token slices: kernels differ numerically for length 1, and a completion must not
    depend on how much of its prompt was cached.
    """
    while begin < end:
        stop = min(begin + PREFILL_CHUNK, end)
        if end - stop == 1 and stop - begin > 2:
            stop -= 1
        yield begin, stop
        begin = stop


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    weights: npt.NDArray[np.float64] = np.exp(shifted)
    weights /= weights.sum()
    return weights
