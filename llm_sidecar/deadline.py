"""The deadline of a request, which all its model calls share, and the error when it passes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final, Self

from llm_sidecar.errors import DeadlineExceeded, TimeSpent
from llm_sidecar.telemetry.calls import ModelCall

_NEGLIGIBLE: Final = 0.05
"""Seconds; a shorter time would be shown as 0.0."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time by which a request must be answered.

    Attributes:
        began: when the request began, on the clock of `time.monotonic`.
        seconds: how long the request may take.
    """

    began: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """The deadline of a request that begins now."""
        return cls(time.monotonic(), seconds)

    def remaining(self) -> float:
        """Seconds that are left; negative once it has passed."""
        return self.began + self.seconds - time.monotonic()

    def timeout(self) -> asyncio.Timeout:
        """A context that raises TimeoutError at the deadline.

        Raises:
            TimeoutError: the deadline has passed already.
        """
        remaining = self.remaining()
        if remaining <= 0:
            raise TimeoutError
        return asyncio.timeout(remaining)

    def exceeded(self, call: ModelCall, retry_after: int) -> DeadlineExceeded:
        """The error for a call that has just missed this deadline, with the duration of each
        phase."""
        spent = self._spent(call)
        before = ""
        if spent.before >= _NEGLIGIBLE:
            before = f"{spent.before:.1f} s in earlier model calls, "
        return DeadlineExceeded(
            f"{call.model} did not answer within {self.seconds:g} s: {before}"
            f"{spent.waiting:.1f} s waiting, {spent.prefill:.1f} s in prefill, "
            f"{spent.decode:.1f} s in decode; {_remedy(spent)}.",
            retry_after=retry_after,
            spent=spent,
        )

    def _spent(self, call: ModelCall) -> TimeSpent:
        now = time.monotonic()
        begun = now if call.begun is None else call.begun
        first_token = now if call.first_token is None else call.first_token
        return TimeSpent(
            before=max(0.0, call.queued - self.began),
            waiting=begun - call.queued,
            prefill=first_token - begun,
            decode=now - first_token,
        )


def _remedy(spent: TimeSpent) -> str:
    """Advice that shortens the longest phase."""
    longest = max(spent.before, spent.waiting, spent.prefill, spent.decode)
    if longest == spent.waiting:
        return "try again later"
    if longest == spent.prefill:
        return "shorten the prompt, or raise REQUEST_TIMEOUT_SECONDS"
    if longest == spent.decode:
        return "lower max_length if you can, or raise REQUEST_TIMEOUT_SECONDS"
    return "try again, or raise REQUEST_TIMEOUT_SECONDS"
