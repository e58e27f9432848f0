"""Requests with an `Idempotency-Key`: each is executed once, and its answer is kept.

    begun = await idempotency.begin(RequestKey("desk", key), fingerprint)
    if isinstance(begun, bytes):
        return begun  # the first answer
    try:
        result = await service(..., begun)
        await idempotency.keep(begun, answer)
    finally:
        idempotency.end(begun)

A service adds `Attempt.progress` to its transactions. If an attempt fails, or its process ends, the
next attempt continues from the state of the last transaction.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llm_sidecar.db import Store
from llm_sidecar.db.transaction import Progress, RequestKey, Transaction
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded
from llm_sidecar.tasks import TaskSet
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES: Final = 1 << 20
"""The size of the largest answer that is kept. The longest texts take a tenth of it."""


@dataclass(slots=True)
class Attempt:
    """One attempt at answering a request.

    Attributes:
        tasks: its work that runs to completion even if the client disconnects.
        deadline: of the request.
        request: None for a request without a key, of which nothing is kept.
        state: the progress of the last attempt, or None.
        kept: whether the answer is kept.
    """

    tasks: TaskSet
    deadline: Deadline
    request: RequestKey | None = None
    state: Mapping[str, Any] | None = None
    kept: bool = False

    def progress(self, state: Mapping[str, Any]) -> Progress | None:
        """The progress for a transaction of the service.

        Args:
            state: JSON types, with which the next attempt begins.
        """
        return None if self.request is None else Progress(self.request, json.dumps(state))


class Idempotency:
    """Claims each request for one attempt at a time, and keeps the answers."""

    def __init__(
        self, store: Store, tasks: TaskSet, metrics: MetricsSink, *, timeout: float
    ) -> None:
        """Does no I/O yet.

        Args:
            store: the database.
            tasks: run to completion even if the client disconnects.
            metrics: counts repeated answers.
            timeout: seconds that a request may take, the wait for an earlier attempt included.
        """
        self._store = store
        self._tasks = tasks
        self._metrics = metrics
        self._timeout = timeout

    def without_key(self) -> Attempt:
        """An attempt whose progress and answer are not kept."""
        return Attempt(TaskSet(self._tasks), Deadline.after(self._timeout))

    async def begin(self, request: RequestKey, fingerprint: str) -> Attempt | bytes:
        """Claims a request; waits while another attempt at it runs, in any process.

        Args:
            request: its key.
            fingerprint: identifies its content.

        Returns:
            A new attempt, which the caller must pass to `end`, or the kept answer of an earlier
            one.

        Raises:
            RequestKeyReused: the key belongs to a request with another content.
            DeadlineExceeded: the other attempt takes too long.
            DatabaseUnavailable: the journal accepts no claims.
        """
        deadline = Deadline.after(self._timeout)
        try:
            async with deadline.timeout():
                claim = await self._store.claim(request, fingerprint)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The first request with this Idempotency-Key still runs after {self._timeout:g} "
                "s; try again.",
                retry_after=1,
            ) from None
        if claim.response is not None:
            self._metrics.replayed()
            return claim.response
        state = None if claim.state is None else json.loads(claim.state)
        return Attempt(TaskSet(self._tasks), deadline, request, state)

    async def keep(self, attempt: Attempt, answer: bytes) -> None:
        """Keeps the answer of an attempt that has succeeded.

        If that fails, the failure is logged, and the next attempt continues from the last state.
        """
        if attempt.request is None:
            return
        if len(answer) > MAX_ANSWER_BYTES:
            log.error("an answer of %d bytes is too large to be kept for a retry", len(answer))
            return
        progress = Progress(attempt.request, response=answer)
        try:
            await attempt.tasks.finish(self._store.commit(Transaction(progress=progress)))
        except DatabaseUnavailable as error:
            log.error("an answer is not kept for a retry: %s", error.detail)
        else:
            attempt.kept = True

    def end(self, attempt: Attempt) -> None:
        """Lets the next attempt begin once all work of this one is done, in the background."""
        if attempt.request is not None and not attempt.kept:
            self._tasks.start(self._release(attempt, attempt.request))

    async def _release(self, attempt: Attempt, request: RequestKey) -> None:
        await attempt.tasks.join()
        try:
            await self._store.release(request)
        except DatabaseUnavailable as error:
            log.error("a request with an Idempotency-Key is not released: %s", error.detail)
