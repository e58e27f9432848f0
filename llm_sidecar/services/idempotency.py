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

The journal decides between the processes of one machine, and Redis between machines. While Redis is
away, the journal alone decides.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llm_sidecar.db import Store
from llm_sidecar.db.transaction import REUSED, Progress, RequestKey, Transaction
from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded, RequestKeyReused
from llm_sidecar.event_bus.leases import Lease
from llm_sidecar.event_bus.request_records import Record, RequestRecords
from llm_sidecar.tasks import TaskSet
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES: Final = 1 << 20
"""The size of the largest answer that is kept. The longest texts take a tenth of it."""
_POLL_SECONDS: Final = 0.1
"""Seconds between two looks at a request that another machine answers."""


@dataclass(slots=True)
class Attempt:
    """One attempt at answering a request.

    Attributes:
        tasks: its work that runs to completion even if the client disconnects.
        deadline: of the request.
        request: None for a request without a key, of which nothing is kept.
        state: the progress of the last attempt, or None.
        kept: whether the answer is kept.
        record: what other machines know of the request.
        lock: makes them wait; None if nothing is shared.
    """

    tasks: TaskSet
    deadline: Deadline
    request: RequestKey | None = None
    state: Mapping[str, Any] | None = None
    kept: bool = False
    record: Record = field(default_factory=lambda: Record.first(""))
    lock: Lease | None = None

    @property
    def id(self) -> uuid.UUID:
        """For what the attempt makes. If a machine dies, the next attempt has the same id, so that
        the database recognises rows that it already has."""
        return self.record.id

    @property
    def begun(self) -> datetime.datetime:
        """When the first attempt began; aware."""
        return self.record.begun

    def progress(self, state: Mapping[str, Any]) -> Progress | None:
        """The progress for a transaction of the service.

        Args:
            state: JSON types, with which the next attempt begins.
        """
        return None if self.request is None else Progress(self.request, json.dumps(state))


class Idempotency:
    """Claims each request for one attempt at a time, and keeps the answers."""

    def __init__(
        self,
        store: Store,
        records: RequestRecords,
        tasks: TaskSet,
        metrics: MetricsSink,
        *,
        timeout: float,
    ) -> None:
        """Does no I/O yet.

        Args:
            store: the database.
            records: shared with other machines.
            tasks: run to completion even if the client disconnects.
            metrics: counts repeated answers.
            timeout: seconds that a request may take, the wait for an earlier attempt included.
        """
        self._store = store
        self._records = records
        self._tasks = tasks
        self._metrics = metrics
        self._timeout = timeout

    def without_key(self) -> Attempt:
        """An attempt whose progress and answer are not kept."""
        return Attempt(TaskSet(self._tasks), Deadline.after(self._timeout))

    async def begin(self, request: RequestKey, fingerprint: str) -> Attempt | bytes:
        """Claims a request; waits while another attempt at it runs, in any process or on another
        machine.

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
        begun: Attempt | bytes | None
        try:
            async with deadline.timeout():
                claim = await self._store.claim(request, fingerprint)
                begun = claim.response
                if begun is None:
                    state = None if claim.state is None else json.loads(claim.state)
                    record = Record.first(fingerprint)
                    tasks = TaskSet(self._tasks)
                    attempt = Attempt(tasks, deadline, request, state, record=record)
                    begun = await self._share(attempt, request) or attempt
        except TimeoutError:
            raise DeadlineExceeded(
                f"The first request with this Idempotency-Key still runs after {self._timeout:g} "
                "s; try again.",
                retry_after=1,
            ) from None
        if isinstance(begun, bytes):
            self._metrics.replayed()
        return begun

    async def _share(self, attempt: Attempt, request: RequestKey) -> bytes | None:
        """Begins the attempt for all machines; if another one has answered the request, ends it and
        returns the response."""
        try:
            record = await self._lock(attempt, request)
            if record is None or record.response is None:
                return None
            response = record.response.encode()
            await attempt.tasks.finish(self._keep_here(attempt, request, response))
        except BaseException:
            self.end(attempt)
            raise
        self.end(attempt)
        return response

    async def _lock(self, attempt: Attempt, request: RequestKey) -> Record | None:
        """Locks the request, or returns its record if it is answered; None while Redis is away."""
        owner = self._store.journal_id
        while True:
            claim = await self._records.claim(request.caller, request.key, attempt.record, owner)
            if claim is None:
                return None
            record, attempt.lock = claim
            if record.fingerprint != attempt.record.fingerprint:
                raise RequestKeyReused(REUSED)
            if attempt.lock is not None or record.response is not None:
                break
            await asyncio.sleep(_POLL_SECONDS)
        attempt.record = record
        if record.state is not None:
            attempt.state = record.state
        return record

    async def keep(self, attempt: Attempt, answer: bytes) -> None:
        """Keeps the answer of an attempt that has succeeded.

        If that fails, the failure is logged, and the next attempt continues from the last state.
        """
        if attempt.request is None:
            return
        if len(answer) > MAX_ANSWER_BYTES:
            log.error("an answer of %d bytes is too large to be kept for a retry", len(answer))
            return
        await attempt.tasks.finish(self._keep(attempt, attempt.request, answer))

    async def _keep(self, attempt: Attempt, request: RequestKey, answer: bytes) -> None:
        await self._keep_here(attempt, request, answer)
        if attempt.kept:
            await self._records.save(request.caller, request.key, attempt.record.answered(answer))
            if attempt.lock is not None:
                self._tasks.start(attempt.lock.release())

    async def _keep_here(self, attempt: Attempt, request: RequestKey, answer: bytes) -> None:
        """Keeps an answer in the journal; a failure is logged."""
        try:
            await self._store.commit(Transaction(progress=Progress(request, response=answer)))
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
            if attempt.lock is not None and not attempt.kept:
                await self._unlock(attempt.lock, attempt.record, request)
            await self._store.release(request)
        except DatabaseUnavailable as error:
            log.error("a request with an Idempotency-Key is not released: %s", error.detail)

    async def _unlock(self, lock: Lease, record: Record, request: RequestKey) -> None:
        """Lets other machines continue from the durable state of a failed attempt."""
        try:
            state = await self._store.request_state(request)
            await self._records.save(request.caller, request.key, record.failed(state))
        finally:
            await lock.release()
