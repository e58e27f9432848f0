"""Bounds of queue and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of a model on this machine; times in seconds.

    Attributes:
        queue_length: requests that may run and wait at once.
        request_timeout: from admission to the answer, for a call without a deadline.
        load_wait: how long a request waits for a loading model; None: until its deadline.
        load_timeout: how long a model may load.
    """

    queue_length: int = 64
    request_timeout: float = 60.0
    load_wait: float | None = None
    load_timeout: float = 300.0

    @property
    def max_load_wait(self) -> float:
        """Seconds that a request waits for a loading model; its deadline may end the wait
        earlier."""
        if self.load_wait is None:
            return self.request_timeout
        return min(self.load_wait, self.request_timeout)
