"""A circuit breaker: sends no requests to a server that fails repeatedly or is full."""

from __future__ import annotations

import time
from typing import Final

from llm_sidecar.errors import ModelUnavailable, QueueFull, SidecarError

_FAILURES: Final = 3
"""Failures in a row that open the breaker: the server rests."""
_LONGEST_REST: Final = 30.0
"""Seconds. The first rest is one second; each further failure doubles it."""


class CircuitBreaker:
    """Decides whether a server gets requests now."""

    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = 0.0
        self._error: SidecarError | None = None

    def refusal(self) -> QueueFull | ModelUnavailable | None:
        """Why the server gets no requests now, and for how long; None if it gets them."""
        left = self._rests_until - time.monotonic()
        if self._error is None or left <= 0:
            return None
        kind = QueueFull if isinstance(self._error, QueueFull) else ModelUnavailable
        return kind(self._error.detail, retry_after=max(1, round(left)))

    def succeeded(self) -> None:
        """Records a success."""
        self._failures = 0

    def is_full(self, error: QueueFull) -> None:
        """Records that the server is full, for as long as it says, within bounds."""
        self._rest(min(_LONGEST_REST, error.retry_after or 1), error)

    def failed(self, error: ModelUnavailable) -> None:
        """Records a failure."""
        self._failures += 1
        if self._failures >= _FAILURES:
            self._rest(min(_LONGEST_REST, 2.0 ** (self._failures - _FAILURES)), error)

    def _rest(self, seconds: float, error: SidecarError) -> None:
        self._rests_until = time.monotonic() + seconds
        self._error = error
