"""Times, counts and outcome of one model call, which the model records and observers receive.

    model = LocalModel("phi3", locate, observer=Observers(metrics, traces))

An observer is called on the event loop, in the context of the request: it must not block and
must not raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

from llm_sidecar import errors
from llm_sidecar.errors import SidecarError

if TYPE_CHECKING:
    from llm_sidecar.models.identity import ModelIdentity

Operation = Literal["generate", "score_choices"]
FinishReason = Literal["stop", "length", "deadline"]

CANCELLED: Final = "Cancelled"
"""The error of a call that was cancelled."""
UNEXPECTED: Final = "Unexpected"
"""The error of a call that failed with an exception outside of `llm_sidecar.errors`: a defect."""


@dataclass(slots=True)
class ModelCall:
    """One request to one model; its attributes are set while it is served.

    Times are in seconds on the clock of `time.monotonic`; None if the call did not get that far.

    Attributes:
        model: `phi3` or `hermes`.
        operation: `generate`, or `score_choices`, which has no tokens and no finish reason.
        queued: when it arrived, before its admission.
        queued_unix: the same moment in seconds since 1970.
        begun: the queue ends and the prefill begins.
        first_token: the prefill ends and the decoding begins.
        finished: when it ended.
        served_by: the label of the model that served it, as in `X-Model`.
        adapter: the name of the adapter it was served with.
        identity: the files and runtime of that model.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        steps: (seconds, tokens) of each progress after the first token.
        finish_reason: `stop`, `length`, or `deadline` if the deadline truncated the text.
        error: the name of its class in `llm_sidecar.errors`, `CANCELLED` or `UNEXPECTED`; None if
            it was answered.
        context: of the request, for observers that run outside of it.
    """

    model: str
    operation: Operation
    queued: float = field(default_factory=time.monotonic)
    queued_unix: float = field(default_factory=time.time)
    begun: float | None = None
    first_token: float | None = None
    finished: float | None = None
    served_by: str | None = None
    adapter: str | None = None
    identity: ModelIdentity | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    steps: list[tuple[float, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context, repr=False)
    _last: float = 0.0

    def progressed(
        self,
        now: float,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        finish_reason: FinishReason | None,
    ) -> None:
        """Records when tokens were generated, and the counts so far."""
        if self.first_token is None:
            self.first_token = now
        elif (new := completion_tokens - self.completion_tokens) > 0:
            self.steps.append((now - self._last, new))
        self._last = now
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cached_tokens = cached_tokens
        self.finish_reason = finish_reason

    def phases(self) -> list[tuple[str, float, float]]:
        """(name, start, end) of queue, prefill and decode; without those that it did not reach."""
        names = ("queue", "prefill", "decode")
        reached = (self.queued, self.begun, self.first_token, self.finished)
        times = [moment for moment in reached if moment is not None]
        return list(zip(names, times, times[1:], strict=False))


@dataclass(frozen=True, slots=True)
class WorkerDeath:
    """The unexpected end of a worker process.

    Attributes:
        model: `phi3` or `hermes`.
        adapter: the name of the adapter it had.
        how: its exit status or signal, in words.
        call: the call that it served, the longest of several; None if it was idle.
    """

    model: str
    adapter: str | None
    how: str
    call: ModelCall | None


class CallObserver(Protocol):
    """Observes every call of a model, refused ones included."""

    def call_started(self, call: ModelCall) -> None:
        """The call is about to be admitted or refused; only `model`, `operation`, `queued` and
        `queued_unix` are set."""
        ...

    def call_finished(self, call: ModelCall) -> None:
        """The call has ended and changes no more."""
        ...


class Observers:
    """Combines several observers; without any, it does nothing."""

    def __init__(self, *observers: CallObserver) -> None:
        self._observers = observers

    def call_started(self, call: ModelCall) -> None:
        """Calls each observer in order."""
        for observer in self._observers:
            observer.call_started(call)

    def call_finished(self, call: ModelCall) -> None:
        """Calls each observer in order."""
        for observer in self._observers:
            observer.call_finished(call)


@contextlib.contextmanager
def observed(observer: CallObserver, call: ModelCall) -> Iterator[ModelCall]:
    """Calls the observer at the start of the call and at its end, with its error if any."""
    observer.call_started(call)
    try:
        yield call
    except BaseException as error:
        call.error = error_name(error)
        raise
    finally:
        call.finished = time.monotonic()
        observer.call_finished(call)


def error_name(error: BaseException) -> str:
    """The name under which an error is counted: of its class, from a bounded set.

    A subclass that another module defines counts as its base class in `llm_sidecar.errors`.
    """
    if isinstance(error, SidecarError):
        kinds = (kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return next(kinds).__name__
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    return UNEXPECTED
