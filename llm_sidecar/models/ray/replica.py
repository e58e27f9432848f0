"""A model in a replica: answers the messages of a `RayModel` in another process."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable, SidecarError
from llm_sidecar.logs import stack
from llm_sidecar.models.base import Adapter, ChatModel
from llm_sidecar.models.failover import ReplicaLost
from llm_sidecar.models.ray.wire import (
    CALL,
    ORDER,
    Answer,
    Begun,
    Call,
    Done,
    Generated,
    Look,
    Order,
    Prefill,
    Refused,
    ReplicaState,
    Reply,
    Scored,
    UseAdapter,
    encode,
    refused,
)
from llm_sidecar.telemetry.calls import ModelCall

log = logging.getLogger(__name__)

_current: Final[ContextVar[ModelCall | None]] = ContextVar("model_call", default=None)


class CurrentCall:
    """Observes the calls of a model, so that a `ModelReplica` can say what happens to each."""

    def call_started(self, call: ModelCall) -> None:
        """Remembers the call of this task."""
        _current.set(call)

    def call_finished(self, call: ModelCall) -> None:
        """Does nothing."""


class ModelReplica:
    """One model, which `CurrentCall` observes."""

    def __init__(
        self, name: str, model: ChatModel, find_adapter: Callable[[str | None], Adapter | None]
    ) -> None:
        """Starts nothing.

        Args:
            name: of this replica.
            model: answers.
            find_adapter: the adapter of this name on this machine; raises AdapterRejected.
        """
        self._name = name
        self._model = model
        self._find_adapter = find_adapter

    async def answer(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The answers to a `Call`; closing it cancels the call. Raises nothing."""
        _current.set(None)
        try:
            call = CALL.decode(body)
            work = self._scored if call.request is None else self._generated
            deadline = Deadline(time.monotonic() - call.elapsed, call.seconds)
            async with contextlib.aclosing(work(call, deadline)) as answers:
                async for answer in answers:
                    yield encode(answer)
        except SidecarError as error:
            yield encode(refused(_lost_if_not_begun(error)))
        except Exception as error:  # noqa: BLE001 - Ray would log its message, maybe a prompt
            yield encode(_failed(error))

    async def obey(self, body: bytes) -> bytes:
        """The reply to an order. Raises nothing."""
        try:
            return encode(await self._obey(ORDER.decode(body)))
        except SidecarError as error:
            return encode(refused(error))
        except Exception as error:  # noqa: BLE001 - Ray would log its message, maybe a prompt
            return encode(_failed(error))

    async def _generated(self, call: Call, deadline: Deadline) -> AsyncGenerator[Answer, None]:
        assert call.request is not None
        begun = False
        async with contextlib.aclosing(self._model.stream(call.request, deadline)) as deltas:
            async for delta in deltas:
                if not begun:
                    yield Begun(_waited(), delta.model, delta.adapter, delta.identity)
                    begun = True
                yield Generated(replace(delta, identity=None))

    async def _scored(self, call: Call, deadline: Deadline) -> AsyncGenerator[Answer, None]:
        scores = await self._model.score_questions(call.questions, deadline)
        current = _current.get()
        label = current.served_by if current is not None else None
        identity = current.identity if current is not None else None
        yield Begun(_waited(), label or "", scores[0].adapter if scores else None, identity)
        yield Scored(scores)

    async def _obey(self, order: Order) -> Reply:
        if isinstance(order, Look):
            return ReplicaState(self._name, self._model.status())
        if order.replica not in (None, self._name):
            return Done()
        if isinstance(order, Prefill):
            await self._model.prefill(order.request)
        else:
            await self._use(order)
        return Done(self._name)

    async def _use(self, order: UseAdapter) -> None:
        adapter = self._find_adapter(order.adapter)
        if adapter != self._model.status().adapter:
            await self._model.use_adapter(adapter)


def _waited() -> float:
    """Seconds from the arrival of the current call to its begin."""
    call = _current.get()
    return 0.0 if call is None or call.begun is None else call.begun - call.queued


def _lost_if_not_begun(error: SidecarError) -> SidecarError:
    """A model that is not available has not begun the call, so another replica may answer it."""
    call = _current.get()
    begun = call is not None and call.begun is not None
    if begun or not isinstance(error, ModelUnavailable):
        return error
    return ReplicaLost(error.detail, retry_after=error.retry_after)


def _failed(error: Exception) -> Refused:
    log.error("a request failed unexpectedly: %s\n%s", type(error).__name__, stack(error))
    return refused(ModelUnavailable("The replica failed; see its log.", retry_after=1))
