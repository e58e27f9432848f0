"""What one call of a model came to: measured once by its host, read by whoever observes.

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

from llm_sidecar.errors import SidecarError

Operation = Literal["generate", "choose"]

CANCELLED: Final = "Cancelled"
"""The error of a call that nobody waits for any more."""
UNEXPECTED: Final = "Unexpected"
"""The error of a call that failed with none of `llm_sidecar.errors`: a defect."""


@dataclass(slots=True)
class ModelCall:
    """One request to one model, filled in while it is served.

    Times are of `time.monotonic`; one is None where the call did not get that far.

    Attributes:
        model: `phi3` or `hermes`.
        operation: `generate`, or `choose` for the probabilities of given answers, which has no
            tokens, no first token and no finish reason.
        queued: when it asked to be admitted.
        queued_unix: the same moment in seconds since 1970.
        begun: when its worker took it up: the queue ends and the prefill begins.
        first_token: when its first token was here: the prefill ends and the decoding begins.
        finished: when its outcome was here.
        served_by: the label of the model that served it, as in `X-Model`.
        adapter: the name of the adapter it was served with.
        prompt_tokens, completion_tokens: as far as it got.
        cached_tokens: of the prompt's, that were read for an earlier one.
        steps: (seconds, tokens) of each message after the first token.
        finish_reason: `stop`, `length`, or `deadline` if the deadline cut the text.
        error: the name of its class in `llm_sidecar.errors`, `CANCELLED` or `UNEXPECTED`; None for
            one that was answered.
        context: of the request, for those who hear of the call outside of it.
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
        """(name, beginning, end) of queue, prefill and decode, as far as the call got."""
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
    """The end of a worker that nobody asked for.

    Attributes:
        model: `phi3` or `hermes`.
        adapter: the name of the adapter it had.
        how: its exit status or signal, in words.
        call: what it was serving, the longest of several, if anything.
    """

    model: str
    adapter: str | None
    how: str
    call: ModelCall | None


class CallObserver(Protocol):
    """Hears of every call of a model, refused ones included."""

    def call_started(self, call: ModelCall) -> None:
        """The call is about to be admitted or refused; nothing but its head is filled in."""
        ...

    def call_finished(self, call: ModelCall) -> None:
        """The call has its outcome and changes no more."""
        ...


class Observers:
    """Several observers as one; none at all observes nothing, and costs nothing."""

    def __init__(self, *observers: CallObserver) -> None:
        self._observers = observers

    def call_started(self, call: ModelCall) -> None:
        """Tells each, in order."""
        for observer in self._observers:
            observer.call_started(call)

    def call_finished(self, call: ModelCall) -> None:
        """Tells each, in order."""
        for observer in self._observers:
            observer.call_finished(call)


@contextlib.contextmanager
def observed(observer: CallObserver, call: ModelCall) -> Iterator[ModelCall]:
    """Tells the observer of the start of the call and, with its error if any, of its end."""
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
    """The bounded name under which an error is counted."""
    if isinstance(error, SidecarError):
        return type(error).__name__
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    return UNEXPECTED
