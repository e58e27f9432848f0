"""The interface of engines, and helpers that they share.

An engine is synchronous and runs in its own worker process.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.outputs import ChoiceScores, Delta, FinishReason, TokenLogprob
from llm_sidecar.engines.requests import GenerationRequest, Message, Question, Sampling

__all__ = [
    "PROBE",
    "Batch",
    "ChoiceScores",
    "Delta",
    "Dtype",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "GenerationRequest",
    "Message",
    "PrefillDtype",
    "Question",
    "Sampling",
    "TokenLogprob",
    "result_of",
    "softmax",
    "steps_alone",
    "unless_failed",
]

T = TypeVar("T")

Dtype = Literal["auto", "bfloat16", "float32"]
"""The precision in which torch computes."""
PrefillDtype = Literal["auto", "bfloat16", "off"]
"""The precision of prefill on torch for a decoder on another runtime; `off`: no such prefill."""

PROBE: Final[Sequence[Message]] = ({"role": "user", "content": "Long ABC. What now?"},)
"""A chat that a model must answer before an adapter is used."""


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

    def text_of(self, tokens: Sequence[int]) -> str:
        """The tokens of a prompt as text, in which control tokens are spelled.

        It may be called from another thread while the engine generates.
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


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    weights: npt.NDArray[np.float64] = np.exp(shifted)
    weights /= weights.sum()
    return weights
