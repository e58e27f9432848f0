"""The interface of engines, and helpers that they share.

An engine is synchronous and runs in its own worker process.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llm_sidecar.errors import InvalidRequest

T = TypeVar("T")

Message = dict[str, str]
"""One chat turn: `{"role": "system" | "user" | "assistant", "content": text}`."""
FinishReason = Literal["stop", "length"]
Dtype = Literal["auto", "bfloat16", "float32"]
"""The precision in which torch computes."""
PrefillDtype = Literal["auto", "bfloat16", "off"]
"""The precision of prefill on torch for a decoder on another runtime; `off`: no such prefill."""

PROBE: Final[Sequence[Message]] = ({"role": "user", "content": "Long ABC. What now?"},)
"""A chat that a model must answer before an adapter is used."""

ANSWER_TOKENS: Final = 4
"""Maximum number of tokens that `score_questions` processes after a prompt."""

LEAST_LOGPROB: Final = -9999.0
"""The logarithm of a probability of 0, which JSON cannot express; OpenAI's API uses the same."""

PREFILL_CHUNK: Final = 256
"""Prompt tokens per prefill step; a request can be cancelled between two steps."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded on this machine.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        threads: of the runtime, on CPU.
        llama_server: the program that runs a .gguf file; None for the llama-server on the PATH,
            else the wheel `xllamacpp`.
        dtype: what torch computes in; see `TorchEngine`.
        prefill_dtype: whether torch reads the prompts of a model on onnxruntime; see `handover`.
            With an adapter it does not.
    """

    device: str = "auto"
    threads: int = 1
    llama_server: str | None = None
    dtype: Dtype | None = None
    prefill_dtype: PrefillDtype = "off"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        messages: the chat, oldest first. If the last one is the assistant's, the completion
            continues it.
        max_tokens: maximum number of completion tokens; 0 for the log probabilities of the prompt
            alone.
        guidance: JSON schema text (llguidance dialect) that the completion must follow, or None.
        temperature: 0 is greedy; otherwise it divides the logits before sampling. None for the
            model's own sampling, from its folder.
        seed: makes sampling repeatable.
        tokens: of the messages or the text, as `Engine.tokenize` returns them, or a prompt of its
            own; None to tokenize them later.
        text: a prompt without a chat template, instead of messages; None for a chat. Like messages,
            it cannot contain control tokens.
        top_p: nucleus sampling with this probability instead of the model's own; None for that.
        logprobs: the number of most likely tokens with log probabilities for each completion
            token; 0 for the token alone, None for no log probabilities. With log probabilities,
            guidance forces no tokens: the model computes each one.
        prompt_logprobs: the same for each token of the prompt.
        fit_context: whether `max_tokens` is lowered to what the context leaves after the prompt;
            without it, a request that does not fit is refused.
        check_answer: whether a model on another server, which may not follow the guidance, refuses
            unsupported keywords and checks the finished answer. All other models follow it.
    """

    messages: Sequence[Message]
    max_tokens: int
    guidance: str | None = None
    temperature: float | None = 0.0
    seed: int | None = None
    tokens: Sequence[int] | None = None
    text: str | None = None
    top_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    fit_context: bool = False
    check_answer: bool = False

    def most_tokens(self, prompt_tokens: int, context_length: int) -> int:
        """`max_tokens`, or with `fit_context` what the context leaves of it."""
        if not self.fit_context:
            return self.max_tokens
        # At least one, so that a prompt that fills the context is still refused.
        return max(1, min(self.max_tokens, context_length - prompt_tokens))


class Question(NamedTuple):
    """A chat, and the answers whose probabilities are needed.

    Attributes:
        tokens: of the chat, as `Engine.tokenize` returns them for `request`; None to tokenize it
            later.
    """

    messages: Sequence[Message]
    choices: Sequence[str]
    tokens: Sequence[int] | None = None

    @property
    def request(self) -> GenerationRequest:
        """The chat, with capacity for an answer."""
        return GenerationRequest(self.messages, ANSWER_TOKENS, tokens=self.tokens)


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """The probability of each of some answers.

    Attributes:
        probabilities: for each answer, the probability that the assistant's turn begins with it
            and not with a longer one of the answers. A turn may also begin with something else,
            so the sum is at most 1.
        prompt_tokens: of the chat; 0 if unknown.
        cached_tokens: prompt tokens that were not processed for this answer, because another prompt
            begins with them.
        adapter: the name of the adapter in use, or None.
    """

    probabilities: Mapping[str, float]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    adapter: str | None = None

    @property
    def mass(self) -> float:
        """The sum of the probabilities. If it is small, another answer is more likely."""
        return sum(self.probabilities.values())


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen; the defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, and of the fields below
            only the repetition penalty applies.
        top_k: only this many of the most probable tokens; 0 for all.
        top_p: only the most probable tokens that together reach this probability (nucleus
            sampling: Holtzman et al. 2020, arXiv:1904.09751).
        min_p: only tokens with at least this share of the highest probability (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: divides the positive logits of tokens that the prompt or the completion
            has, and multiplies the negative ones (Keskar et al. 2019, "CTRL", arXiv:1909.05858,
            section 4.1); 1 for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, before temperature, penalties, filters
    and guidance.

    Attributes:
        id: of the token in the model's vocabulary.
        data: its bytes; a character may need several tokens.
        logprob: at least `LEAST_LOGPROB`; None for the first token of a prompt, which has no
            context.
        top: the most likely tokens at this position, most likely first, each without a `top`.
    """

    id: int
    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a generation: new text, and the counts so far.

    Attributes:
        cached_tokens: prompt tokens whose states were cached.
        finish_reason: set in the last delta only.
        logprobs: of the tokens of the new text, if requested; without the token that ends the turn.
        prompt_logprobs: of the prompt tokens that this step processed. They are complete with the
            first token of the completion at the latest.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    """A loaded language model.

    Attributes:
        runtime: package that runs it.
        device: `cpu` or `cuda`.
        context_length: maximum number of prompt and completion tokens of a request.
        notes: where the engine deviates from the model's files, one sentence each.
        scores_in_parallel: whether threads may run `score_questions` while the engine generates.
        versions: of the programs that it uses beside the packages of this process.
        dtype: the precision in which torch computes; None if the engine does not use torch.
        prefill_folder: the transformers folder of the model that does the prefill for another
            runtime, or None.
        sampling: the model's own, for requests without a temperature.
    """

    runtime: str
    device: str
    context_length: int
    notes: tuple[str, ...]
    scores_in_parallel: bool
    versions: Mapping[str, str]
    dtype: str | None
    prefill_folder: Path | None
    sampling: Sampling

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        """The tokens of a request's messages: `request.tokens` if given, otherwise encoded now.

        It may be called from another thread while the engine generates.

        Args:
            header: whether the header of the assistant's turn follows. Without it, the tokens are
                the common prefix of all prompts with these messages and a further user turn.

        Raises:
            InvalidRequest: prompt and completion do not fit the context, the prompt holds something
                that cannot be encoded, or the guidance cannot be followed.
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

    def decode_steps(self, count: int) -> Generator[None]:
        """Decodes `count` tokens one at a time, to measure the speed; keeps no states.

        Yields once before the first step, when the weights are in memory, and after each step.
        """
        ...

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        """The prompt's tokens, and the probability of each next token, (vocabulary,).

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...

    def score_questions(
        self, questions: Sequence[Question]
    ) -> Generator[None, None, list[ChoiceScores]]:
        """For each question, the probability that the assistant's turn begins with each of its
        choices; see `ChatModel.score_choices`.

        It works step by step, like `prefill`, and returns the result. It processes a common prefix
        of the prompts once.

        Raises:
            InvalidRequest, ModelUnavailable: as in `tokenize`.
        """
        ...

    def score_choices(
        self, messages: Sequence[Message], choices: Sequence[str]
    ) -> dict[str, float]:
        """The probabilities of `score_questions` for one question, at once.

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

    def step(self) -> Sequence[tuple[int, Delta | Exception]]:
        """The deltas of the requests that progressed, in a short time; there may be none.

        Requests with a finish reason leave the batch. So does a request that fails alone: it gets
        the error instead of a delta.

        Raises:
            Exception: the runtime failed; all requests have failed, and the batch is empty.
        """
        ...


def steps_alone(batch: Batch, request: GenerationRequest) -> Generator[list[Delta]]:
    """The deltas of each step of a batch with this request only; closing the iterator cancels it.

    Raises:
        InvalidRequest, ModelUnavailable: as in `Batch.add`.
        Exception: the request failed.
    """
    batch.add(0, request)
    try:
        while batch:
            yield [unless_failed(result) for _, result in batch.step()]
    finally:
        if batch:
            batch.remove(0)


def result_of(steps: Generator[None, None, T]) -> T:
    """Runs a generator to its end, and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def unless_failed(result: Delta | Exception) -> Delta:
    """Returns the delta of a result of `Batch.step`, or raises its error."""
    if isinstance(result, Exception):
        raise result
    return result


def check_context(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raises InvalidRequest unless prompt and completion fit."""
    if prompt_tokens + max_tokens <= context_length:
        return
    if prompt_tokens + ANSWER_TOKENS > context_length:
        # A smaller max_length does not help here, and a score request has none.
        raise InvalidRequest(
            f"it takes {prompt_tokens} tokens, which is too many for the model's context "
            f"of {context_length}; shorten it",
            field="prompt",
            exceeds_context=True,
        )
    raise InvalidRequest(
        f"it takes {prompt_tokens} tokens, which with the tokens of the answer is more "
        f"than the model's context of {context_length}; shorten it, or ask for a shorter answer",
        field="prompt",
        exceeds_context=True,
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
