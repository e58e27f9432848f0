"""Whether a model is loaded, and how long a request should wait until it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.base import State


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Bounds of a model on this machine; times in seconds.

    Attributes:
        queue_length: requests that may run and wait at once.
        request_timeout: from admission to the answer, for a call without a deadline of its own.
        load_wait: how long a request waits for a loading model; None: until its deadline.
        load_timeout: how long a model may load.
    """

    queue_length: int = 64
    request_timeout: float = 60.0
    load_wait: float | None = None
    load_timeout: float = 300.0

    @property
    def patience(self) -> float:
        """How long a request waits for a loading model, if its deadline is not earlier."""
        if self.load_wait is None:
            return self.request_timeout
        return min(self.load_wait, self.request_timeout)


class LoadState:
    """The state of a model; times are of `time.monotonic`.

    Attributes:
        state: see `ModelStatus`.
        reason: of the last failure, until the model is ready again.
        restarts: failures after which the model is loaded again.
    """

    def __init__(self, name: str, limits: ModelLimits, *, preload: bool) -> None:
        """An unloaded model.

        Args:
            name: `phi3` or `hermes`.
            limits: how long a request waits for the model.
            preload: requests should not have to wait for the first load.
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
        """The first load begins."""
        self.state, self.reason, self._began = "loading", None, time.monotonic()

    def retry(self) -> None:
        """The next load after a failure begins."""
        self.state = "loading"

    def ready(self) -> None:
        """A worker serves requests."""
        self.state, self.reason = "ready", None

    def fail(self, reason: str, delay: float, *, served: bool) -> None:
        """The model is loaded again after this delay.

        Args:
            served: whether a worker has died that served requests; otherwise the load failed.
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
        """When a request stops waiting: at `by`, or later if a worker died during the wait."""
        load_wait = self._limits.load_wait
        return by if load_wait is None else max(by, self._died + load_wait)

    def is_hopeless(self, by: float) -> bool:
        """Whether the model will most likely not be ready before a request stops waiting.

        After a failed load the next one most likely fails too. But a worker that has served before
        it died is replaced soon.
        """
        if self.state != "failed":
            return False
        return self._load_failed or self._next_load > self.wait_until(by)

    def not_ready(self) -> str | None:
        """Why a new request would most likely not be served in time; None if it would."""
        if self.is_ready:
            return None
        lazy_load = self.state == "loading" and self.reason is None and not self._preload
        if lazy_load and time.monotonic() < self._began + self._limits.patience:
            return None
        return self.reason or f"The {self._name} model is loading."

    def error(self) -> ModelUnavailable:
        """The error of a request that stops waiting."""
        if self.state == "failed":
            return ModelUnavailable(
                f"The {self._name} model is not available: {self.reason}.",
                retry_after=max(1, round(self._next_load - time.monotonic())),
            )
        return ModelUnavailable(f"The {self._name} model is still loading.", retry_after=5)
