"""A circuit breaker: sends no requests to a server that fails repeatedly or is full.

Three failures in a row open the circuit, and the server rests. Then the circuit is half-open: the
server gets one request, and no other until it begins to answer. A success closes the circuit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

from llm_sidecar.errors import ModelUnavailable, QueueFull, SidecarError

_FAILURES: Final = 3
"""Failures in a row that open the circuit."""
_LONGEST_REST: Final = 30.0
"""Seconds. The first rest is one second; each further failure doubles it."""
_MOST_DOUBLINGS: Final = 5
"""After so many, a rest is longer than the longest one; 2 to the power of 1024 is no float."""


class CircuitBreaker:
    """Decides whether a server gets requests now."""

    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = 0.0
        self._error: SidecarError | None = None
        # The request that tries a half-open circuit, until it begins to answer.
        self._trial: object | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the circuit is closed, so that several requests may be sent at once."""
        return self._failures < _FAILURES

    def refusal(self) -> QueueFull | ModelUnavailable | None:
        """Why the server gets no requests now, and for how long; None if it gets them."""
        left = self._rests_until - time.monotonic()
        if self._error is None or (left <= 0 and self._trial is None):
            return None
        kind = QueueFull if isinstance(self._error, QueueFull) else ModelUnavailable
        return kind(self._error.detail, retry_after=max(1, round(left)))

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request to the server; while the circuit is half-open, no other one until it begins to
        answer."""
        trial = object()
        if not self.is_closed:
            self._trial = trial
        try:
            yield
        finally:
            if self._trial is trial:
                self._trial = None

    def answers(self) -> None:
        """Records the beginning of an answer."""
        self._trial = None

    def succeeded(self) -> None:
        """Records a success."""
        self._failures = 0
        self._trial = None

    def is_full(self, error: QueueFull) -> None:
        """Records that the server is full, for as long as it says, within bounds."""
        self._rest(min(_LONGEST_REST, error.retry_after or 1), error)

    def failed(self, error: ModelUnavailable) -> None:
        """Records a failure."""
        self._failures += 1
        if self._failures >= _FAILURES:
            doublings = min(self._failures - _FAILURES, _MOST_DOUBLINGS)
            self._rest(min(_LONGEST_REST, 2.0**doublings), error)

    def _rest(self, seconds: float, error: SidecarError) -> None:
        self._rests_until = time.monotonic() + seconds
        self._error = error
