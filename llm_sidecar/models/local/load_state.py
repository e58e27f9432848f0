"""Whether a model is loaded, and how long a request waits for it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.status import State

_LONGEST_RETRY: Final = 30.0
"""Seconds after which a request may try again at the latest, however long a failure lasts."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
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


class LoadState:
    """The state of a model; times are of `time.monotonic`.

    Attributes:
        state: see `ModelStatus`.
        reason: of the last failure, until the model is ready again.
        restarts: the number of failures so far that another load follows by itself.
    """

    def __init__(self, name: str, limits: ModelLimits, *, preload: bool) -> None:
        """An unloaded model.

        Args:
            name: `phi3` or `hermes`.
            limits: how long a request waits for the model.
            preload: whether the model loads at the start, before any request.
        """
        self.state: State = "unloaded"
        self.reason: str | None = None
        self.restarts = 0
        self._name = name
        self._limits = limits
        self._preload = preload
        self._began = 0.0
        self._died = -math.inf
        self._next_load = 0.0
        self._load_failed = False

    def begin(self) -> None:
        """Records that the first load begins."""
        self.state, self.reason, self._began = "loading", None, time.monotonic()

    def give_up(self, reason: str) -> None:
        """Records that the model cannot be loaded from its files as they are."""
        self.state, self.reason, self._next_load = "failed", reason, math.inf
        self._load_failed = True

    def retry(self) -> None:
        """Records that the next load after a failure begins."""
        self.state = "loading"

    def ready(self) -> None:
        """Records that a worker serves requests."""
        self.state, self.reason = "ready", None

    def fail(self, reason: str, delay: float, *, served: bool) -> None:
        """Records a failure; the model is loaded again after `delay` seconds.

        Args:
            served: True if a worker that served requests has died, False if a load has failed.
        """
        now = time.monotonic()
        self.state, self.reason, self._next_load = "failed", reason, now + delay
        self._load_failed = not served
        self.restarts += 1
        if served:
            self._died = now

    @property
    def is_ready(self) -> bool:
        """Whether a worker serves requests."""
        return self.state == "ready"

    def wait_until(self, by: float) -> float:
        """The time at which a request stops waiting: `by`, or later if a worker died during the
        wait."""
        load_wait = self._limits.load_wait
        return by if load_wait is None else max(by, self._died + load_wait)

    def is_hopeless(self, by: float) -> bool:
        """Whether the model is unlikely to be ready before a request stops waiting.

        After a failed load the next one is likely to fail too. A worker that died after it had
        served is replaced soon.
        """
        if self.state != "failed":
            return False
        return self._load_failed or self._next_load > self.wait_until(by)

    def not_ready(self) -> str | None:
        """Why a new request would most likely not be served in time; None if it would."""
        if self.is_ready:
            return None
        lazy_load = self.state == "loading" and self.reason is None and not self._preload
        if lazy_load and time.monotonic() < self._began + self._limits.max_load_wait:
            return None
        return self.reason or f"The {self._name} model is loading."

    def error(self) -> ModelUnavailable:
        """The error of a request that stops waiting."""
        if self.state == "failed":
            wait = min(_LONGEST_RETRY, self._next_load - time.monotonic())
            return ModelUnavailable(
                f"The {self._name} model is not available: {self.reason}.",
                retry_after=max(1, round(wait)),
            )
        return ModelUnavailable(f"The {self._name} model is still loading.", retry_after=5)
