"""The result of a model call: the model measures it once, and every observer receives it.

    host = ModelHost("phi3", locate, warm_up=..., observer=Observers(metrics, traces))

An observer is called on the event loop, in the context of the request: it must not block, and
must not raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from llm_sidecar import errors
from llm_sidecar.errors import SidecarError

Operation = Literal["generate", "score_choices"]

CANCELLED: Final = "Cancelled"
"""The error of a call that its caller has cancelled."""
UNEXPECTED: Final = "Unexpected"
"""The error of a call that failed with an exception outside of `llm_sidecar.errors`: a defect."""


@dataclass(slots=True)
class ModelCall:
    """One request to one model; its attributes are set while it is served.

    Times are those of `time.monotonic`, in seconds; a time is None if the call did not get so far.

    Attributes:
        model: `phi3` or `hermes`.
        operation: `generate`, or `score_choices`, which has no tokens, no first token and no finish
            reason.
        queued: when it was made.
        queued_unix: the same moment in seconds since 1970.
        begun: when a worker started it: queueing ends and prefill begins.
        first_token: when its first token arrived: prefill ends and decoding begins.
        finished: when its result arrived.
        served_by: the label of the model that served it, as in `X-Model`.
        adapter: the name of the adapter that it was served with.
        prompt_tokens, completion_tokens: counts so far.
        cached_tokens: prompt tokens whose prefill was reused from an earlier prompt.
        steps: (seconds, tokens) of each message after the first token.
        finish_reason: `stop`, `length`, or `deadline` if the deadline cut the text.
        error: its `error_name`; None if it was answered.
        context: the context of the request, for observers that run outside of it.
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
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    steps: list[tuple[float, int]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context, repr=False)
    _last: float = 0.0

    def note(self, message: Mapping[str, Any]) -> None:
        """Takes the time, and the counts, of a message from the worker.

        The time is the worker's own: processes of one machine share the monotonic clock.
        """
        now = message.get("at", time.monotonic())
        if message["op"] == "begun":
            self.begun = now
        elif "completion_tokens" in message:
            self._note_tokens(now, message)

    def phases(self) -> list[tuple[str, float, float]]:
        """(name, start, end) of queue, prefill and decode; without those that it did not reach."""
        names = ("queue", "prefill", "decode")
        reached = (self.queued, self.begun, self.first_token, self.finished)
        times = [moment for moment in reached if moment is not None]
        return list(zip(names, times, times[1:], strict=False))

    def _note_tokens(self, now: float, message: Mapping[str, Any]) -> None:
        new = message["completion_tokens"] - self.completion_tokens
        if self.first_token is None:
            self.first_token = now
        elif new > 0:
            self.steps.append((now - self._last, new))
        self._last = now
        self.prompt_tokens = message["prompt_tokens"]
        self.completion_tokens = message["completion_tokens"]
        self.cached_tokens = message["cached_tokens"]
        self.finish_reason = message["finish_reason"]


@dataclass(frozen=True, slots=True)
class WorkerDeath:
    """The unexpected end of a worker.

    Attributes:
        model: `phi3` or `hermes`.
        adapter: the name of its adapter, or None.
        how: its exit status or signal, in words.
        call: the call that it had been serving longest, or None.
    """

    model: str
    adapter: str | None
    how: str
    call: ModelCall | None


class CallObserver(Protocol):
    """Receives every model call, refused ones included."""

    def call_started(self, call: ModelCall) -> None:
        """A call is made; it is neither admitted nor refused yet."""
        ...

    def call_finished(self, call: ModelCall) -> None:
        """A call has its result, and does not change any more."""
        ...


class Observers:
    """Several observers as one, or none."""

    def __init__(self, *observers: CallObserver) -> None:
        self._observers = observers

    def call_started(self, call: ModelCall) -> None:
        """Passes the call to each, in order."""
        for observer in self._observers:
            observer.call_started(call)

    def call_finished(self, call: ModelCall) -> None:
        """Passes the call to each, in order."""
        for observer in self._observers:
            observer.call_finished(call)


@contextlib.contextmanager
def observed(observer: CallObserver, call: ModelCall) -> Iterator[ModelCall]:
    """Passes the call to the observer when the block begins and when it ends, with its error."""
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
