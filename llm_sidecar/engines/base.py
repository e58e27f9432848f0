"""What every engine can do, and the text handling that engines share.

An engine is synchronous and lives in a worker process of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llm_sidecar.errors import InvalidRequest, SidecarError

Message = dict[str, str]
"""One chat turn: `{"role": "system" | "user" | "assistant", "content": text}`."""
FinishReason = Literal["stop", "length"]

PROBE: Final[Sequence[Message]] = ({"role": "user", "content": "Long ABC. What now?"},)
"""What a model has to answer before an adapter is taken into use."""

_LONGEST_LINE: Final = 400
"""Characters of an error message that are shown."""
ANSWER_TOKENS: Final = 2
"""The longest answer that `answer_probabilities` can read."""

PREFILL_CHUNK: Final = 256
"""Prompt tokens processed between two chances to cancel."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        messages: the chat so far.
        max_tokens: greatest number of completion tokens.
        guidance: JSON schema text (llguidance dialect) that the completion must follow, or None.
        temperature: 0 is greedy; otherwise the logits are divided by it and sampled from.
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
        cached_tokens: of the prompt, that were read for an earlier one.
        finish_reason: of the last delta, and of it alone.
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
        context_length: greatest number of prompt and completion tokens together.
    """

    runtime: str
    device: str
    context_length: int

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        """The tokens of a request's messages: `request.tokens` if given, otherwise encoded now.

        It may be called from another thread while the engine generates.

        Args:
            header: whether the header of the assistant's turn follows; `prepare` takes tokens
                without it.

        Raises:
            InvalidRequest: prompt and completion do not fit the context, or the messages hold
                something that cannot be encoded.
            ModelUnavailable: the model's chat template refuses the chat.
        """
        ...

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        """Generates step by step; closing the iterator stops the generation.

        What the prompt shares with an earlier one is not read again.

        Raises:
            InvalidRequest, ModelUnavailable: as of `tokenize`.
        """
        ...

    def together(self) -> Together:
        """An empty set of requests to generate at the same time."""
        ...

    def prepare(self, request: GenerationRequest) -> Generator[None]:
        """Reads `messages`, which prompts to come begin with, step by step, beside what is kept.

        Args:
            request: with the turns that come first, and all else as it will be.

        Raises:
            InvalidRequest, ModelUnavailable: as of `tokenize`.
        """
        ...

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        """The prompt's tokens, and the probability of each token, (vocabulary,), to come next.

        Raises:
            InvalidRequest, ModelUnavailable: as of `tokenize`.
        """
        ...

    def answer_probabilities(
        self,
        messages: Sequence[Message],
        answers: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Probability that the assistant's turn is each of `answers`, from one prefill.

        Args:
            tokens: of the messages, as `tokenize` returns them for `ANSWER_TOKENS` new tokens;
                None to tokenize them here.

        Raises:
            InvalidRequest, ModelUnavailable: as of `tokenize`.
        """
        ...


class Together(Protocol):
    """Requests that are generated at the same time, by number.

    A worker adds and removes them between two steps, so that a late one need not wait until those
    before it are answered (continuous batching: Yu et al. 2022, "Orca: A Distributed Serving System
    for Transformer-Based Generative Models").

    Attributes:
        most: how many there may be.
    """

    most: int

    def __len__(self) -> int: ...

    def add(self, number: int, request: GenerationRequest) -> None:
        """Takes in one more; there is room for it.

        Raises:
            InvalidRequest, ModelUnavailable: as of `Engine.tokenize`, if the request has no tokens;
                the next step may raise them instead.
        """
        ...

    def remove(self, number: int) -> None:
        """Gives one up."""
        ...

    def step(self) -> list[tuple[int, Delta]]:
        """What each of them wrote, be it nothing; those with a finish reason are gone afterwards.

        Raises:
            Exception: the runtime failed, and all of them with it; none is left.
        """
        ...


def check_context(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raises InvalidRequest unless prompt and completion fit."""
    if prompt_tokens + max_tokens <= context_length:
        return
    if prompt_tokens + ANSWER_TOKENS > context_length:
        # A smaller max_length would not help, and a score request has none.
        raise InvalidRequest(
            f"prompt: it takes {prompt_tokens} tokens, which is too many for the model's context "
            f"of {context_length}; shorten it"
        )
    raise InvalidRequest(
        f"prompt: it takes {prompt_tokens} tokens, which with max_length is more than the model's "
        f"context of {context_length}; shorten one of them"
    )


def prefill_steps(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The slices in which a prompt's tokens are read.

    None is of one token where there are more: runtimes reckon a single token otherwise than
    several, with results that differ in the last digits, and an answer should not depend on what
    was read before.
    """
    while begin < end:
        stop = min(begin + PREFILL_CHUNK, end)
        if end - stop == 1 and stop - begin > 2:
            stop -= 1
        yield begin, stop
        begin = stop


class AnswerTree:
    """The answers as token sequences of one or two tokens, the second after one shared first.

    `0` to `10` with a tokenizer that splits digits is such a tree: `10` is `1`, then `0`. So all
    probabilities can be read after two positions, the prompt's last and that of `branch`.
    """

    def __init__(self, encoded: Mapping[str, Sequence[int]]) -> None:
        branches = {tokens[0] for tokens in encoded.values() if len(tokens) == 2}
        if len(branches) > 1 or any(len(tokens) not in (1, 2) for tokens in encoded.values()):
            raise ValueError("the tokenizer splits the answers into more than one branch")
        self._encoded = dict(encoded)
        self.branch: int | None = branches.pop() if branches else None

    def read(self, first: npt.NDArray[Any], second: npt.NDArray[Any] | None) -> dict[str, float]:
        """Probability of each answer.

        Args:
            first: (vocabulary,) logits after the prompt.
            second: (vocabulary,) logits after the prompt and `branch`; None without a branch.
        """
        p_first = softmax(first)
        p_second = None if second is None else softmax(second)
        longer = [tokens[1] for tokens in self._encoded.values() if len(tokens) == 2]
        result = {}
        for answer, tokens in self._encoded.items():
            probability = float(p_first[tokens[0]])
            if p_second is not None and tokens[0] == self.branch:
                ends_here = 1.0 - float(p_second[longer].sum())
                probability *= float(p_second[tokens[1]]) if len(tokens) == 2 else ends_here
            result[answer] = probability
        return result


def one_line(error: Exception) -> str:
    """What went wrong while a model or an adapter was loaded, for the log and for `/health`."""
    said = error.detail if isinstance(error, SidecarError) else f"{type(error).__name__}: {error}"
    # An error may quote a name from a file, which may be long or have control characters.
    printable = (char if char.isprintable() else " " for char in said[:_LONGEST_LINE])
    return " ".join("".join(printable).split())


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Probabilities of the last axis, in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    weights: npt.NDArray[np.float64] = np.exp(shifted)
    weights /= weights.sum()
    return weights
