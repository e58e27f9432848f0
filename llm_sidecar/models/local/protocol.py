"""Messages between the server and a worker process: one JSON object a line in both directions.

The server sends `Load` first, then jobs and cancellations. The worker answers with `Ready` or
`LoadFailed`, and then to each job:

    Generate        Begun, PromptText if it is requested, PromptLogprobs, ..., Progress, ... The
                    last one has a finish reason.
    ScoreQuestions  Begun, Scores
    Check, Prefill  Done

A job that fails ends with `Failed`, one that is cancelled with `Done`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgspec

from llm_sidecar.engines.base import (
    ChoiceScores,
    EngineOptions,
    FinishReason,
    GenerationRequest,
    Question,
    TokenLogprob,
)
from llm_sidecar.errors import InvalidRequest
from llm_sidecar.logs import LogFormat
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.status import Speed


class Load(msgspec.Struct, frozen=True, tag=True):
    """Loads a model.

    Attributes:
        model: the folder of the model, or its .gguf file.
        options: how it is loaded.
        adapter: folder of the adapter, or None.
        prefix: the messages that most requests begin with; prefilled before the worker is ready.
        log_format: of the worker's log lines.
    """

    model: str
    options: EngineOptions
    adapter: str | None = None
    prefix: GenerationRequest | None = None
    log_format: LogFormat = "auto"


class Job(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Work; `WorkerProcess.send` assigns the id."""

    id: int = 0


class RequestJob(Job, frozen=True, kw_only=True):
    """Work on a request."""

    request: GenerationRequest

    @property
    def largest(self) -> GenerationRequest:
        """The request."""
        return self.request


class Generate(RequestJob, frozen=True):
    """Generates a completion."""


class ScoreQuestions(Job, frozen=True, kw_only=True):
    """Computes the probability of each choice of these questions."""

    questions: Sequence[Question]

    @property
    def largest(self) -> GenerationRequest:
        """The longest question: if it fits the context, all questions do."""
        return max(self.questions, key=_characters).request


class Check(RequestJob, frozen=True):
    """Checks whether a request is valid and fits the context."""


class Prefill(RequestJob, frozen=True):
    """Prefills the messages of a request, which later requests begin with."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stops a job."""

    id: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded.

    Attributes:
        identity: its files and runtime.
        context_length: maximum number of prompt and completion tokens of a request.
        capacity: requests that are generated at the same time.
        speed: of one request; None if it was not measured.
        notes: see `Engine`.
    """

    identity: ModelIdentity
    context_length: int
    capacity: int
    speed: Speed | None = None
    notes: tuple[str, ...] = ()


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; the worker ends.

    Attributes:
        detail: the reason.
        permanent: whether the reason is in the files, so that another load fails too.
    """

    detail: str
    permanent: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An answer to a job.

    Attributes:
        id: of the job.
        at: when it was written, in seconds of the monotonic clock, which all processes share.
    """

    id: int
    at: float = msgspec.field(default_factory=time.monotonic)


class Begun(Answer, frozen=True):
    """The worker begins with the job."""


class PromptText(Answer, frozen=True, kw_only=True):
    """The prompt as text, if it is requested."""

    text: str


class PromptLogprobs(Answer, frozen=True, kw_only=True):
    """Log probabilities of the next tokens of the prompt."""

    tokens: tuple[TokenLogprob, ...]


class Progress(Answer, frozen=True, kw_only=True):
    """New text of a completion.

    Attributes:
        text: generated since the last message.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        new_tokens: completion tokens since the last message.
        finish_reason: of the last message; None before, and if the job was cancelled.
        logprobs: of the tokens of the text.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    new_tokens: int
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Scores(Answer, frozen=True, kw_only=True):
    """The scores of each question, in order."""

    scores: list[ChoiceScores]


class Done(Answer, frozen=True):
    """The job has ended without a result."""


class Died(Answer, frozen=True, kw_only=True):
    """The worker has ended with the job unanswered; `WorkerProcess` writes it, not the worker.

    Attributes:
        how: its exit status or signal, in words.
    """

    how: str


class Failed(Answer, frozen=True, kw_only=True):
    """The job has failed.

    Attributes:
        detail: the reason.
        invalid: whether the request was invalid; `detail` is then the error's `problem`.
        field, exceeds_context: see `InvalidRequest`.
    """

    detail: str
    invalid: bool = False
    field: str | None = None
    exceeds_context: bool = False


LOAD: Final = msgspec.json.Decoder(Load)
FROM_SERVER: Final = msgspec.json.Decoder(Generate | ScoreQuestions | Check | Prefill | Cancel)
FROM_WORKER: Final = msgspec.json.Decoder(
    Ready | LoadFailed | Begun | PromptText | PromptLogprobs | Progress | Scores | Done | Failed
)


def joined(first: Progress, second: Progress) -> Progress:
    """Two pieces of progress as one; `second` came after `first`."""
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        new_tokens=first.new_tokens + second.new_tokens,
        logprobs=first.logprobs + second.logprobs,
    )


def is_final(answer: Answer) -> bool:
    """Whether it is the last answer to its job."""
    if isinstance(answer, Progress):
        return answer.finish_reason is not None
    return not isinstance(answer, Begun | PromptText | PromptLogprobs)


def encode(message: msgspec.Struct) -> bytes:
    """The message as a line.

    Raises:
        InvalidRequest: a text is no Unicode.
    """
    try:
        return msgspec.json.encode(message) + b"\n"
    except UnicodeEncodeError:
        raise InvalidRequest(
            "it holds half of a surrogate pair; send Unicode text", field="prompt"
        ) from None


def _characters(question: Question) -> int:
    return sum(len(message["content"]) for message in question.messages)
