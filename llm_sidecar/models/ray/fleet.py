"""All replicas of a model on Ray Serve: their states, their adapter and their prefix."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import replace
from typing import Any, Final, Protocol

from llm_sidecar.errors import AdapterRejected, ModelUnavailable, SidecarError
from llm_sidecar.logs import start_detached
from llm_sidecar.models.base import Adapter, GenerationRequest, ModelStatus
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.ray.wire import (
    REPLY,
    Done,
    Look,
    Order,
    Prefill,
    Refused,
    ReplicaState,
    Reply,
    UseAdapter,
    encode,
    error_of,
)
from llm_sidecar.models.replica_status import combined
from llm_sidecar.tasks import cancel

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
"""Seconds between two looks at the replicas, and the longest wait for their replies."""
_CHANGE_LOOK_SECONDS: Final = 10.0
"""The longest wait for these replies before a change of the adapter."""
_STALE_SECONDS: Final = 5.0
"""Seconds after which a state does not count any more."""
_SETTLE_SECONDS: Final = 5.0
"""Seconds in which all sidecars notice a change of the adapter by one of them, and a pause between
two attempts."""
_CANCEL_SECONDS: Final = 2.0


class Replicas(Protocol):
    """The replicas of one model."""

    def answer(self, call: bytes) -> AsyncGenerator[bytes, None]:
        """The answers of one of them; closing the iterator cancels the call.

        It waits for a replica that takes the call.

        Raises:
            ReplicaLost: it has died.
            ModelUnavailable: there is none, and none is about to start.
        """
        ...

    async def obey(self, order: bytes, seconds: float) -> list[bytes]:
        """The replies of all that run now, in any order, without those that die meanwhile.

        Raises:
            ModelUnavailable: there is none.
            TimeoutError: not all have replied.
        """
        ...


class Fleet:
    """The replicas of one model, as one sidecar sees them."""

    def __init__(self, name: str, replicas: Replicas, limits: ModelLimits) -> None:
        """Contacts nothing.

        Args:
            name: `phi3` or `hermes`.
            replicas: each with the whole model.
            limits: bounds of time.
        """
        self._name = name
        self._replicas = replicas
        self._limits = limits
        self._adapter: Adapter | None = None
        self._prefix: GenerationRequest | None = None
        self._states: dict[str, ModelStatus] = {}
        self._looked = -_STALE_SECONDS
        # New replicas with another adapter, and since when that is known.
        self._strangers: dict[str, float] = {}
        self._swap = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    async def prefill(self, prefix: GenerationRequest) -> None:
        """Prefills this prefix in each replica, also in those that start later."""
        self._prefix = prefix
        await self._prefill(Prefill(prefix))

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Changes one replica after the other; see `ChatModel.use_adapter`.

        If one of them refuses the adapter, those that have changed go back.
        """
        # Ray cancels the calls of a request whose client disconnects: in no context, there is no
        # such request.
        change = start_detached(self._change(adapter))
        try:
            await asyncio.shield(change)
        except asyncio.CancelledError:
            change.cancel()
            raise

    def start(self, adapter: Adapter | None) -> None:
        """Starts to look at the replicas, which have loaded the adapter in use themselves."""
        self._adapter = adapter
        self._watching = start_detached(self._watch())

    def status(self) -> ModelStatus:
        """The state at the last look, without the counts of requests."""
        if time.monotonic() - self._looked < _STALE_SECONDS and self._states:
            status = combined([self._states[replica] for replica in sorted(self._states)])
        else:
            reason = f"No replica of {self._name} answers."
            status = ModelStatus(state="loading", not_ready=reason)
        tokens = sum(state.completion_tokens_total for state in self._states.values())
        return replace(status, adapter=self._adapter, completion_tokens_total=tokens)

    async def close(self) -> None:
        """Stops looking; the replicas go on."""
        tasks = [*self._tasks, *filter(None, [self._watching])]
        await cancel(*tasks, patience=_CANCEL_SECONDS)

    async def _change(self, adapter: Adapter | None) -> None:
        name = _name(adapter)
        async with self._swap:
            changed: dict[str, str | None] = {}
            try:
                # Replicas may start meanwhile.
                while others := {
                    replica: _name(status.adapter)
                    for replica, status in (await self._look(_CHANGE_LOOK_SECONDS)).items()
                    if _name(status.adapter) != name and replica not in changed
                }:
                    for replica, former in sorted(others.items()):
                        # A later one may end meanwhile. The first one may have ended for it.
                        if not await self._use(name, replica) and not changed:
                            raise ModelUnavailable(
                                f"A replica of {self._name} ended while its adapter was changed; "
                                "try again.",
                                retry_after=5,
                            )
                        changed[replica] = former
            except BaseException:
                for replica, former in changed.items():
                    with contextlib.suppress(ModelUnavailable, AdapterRejected):
                        await self._use(former, replica)
                raise
            self._adapter = adapter

    async def _use(self, adapter: str | None, replica: str) -> bool:
        """Changes one replica; returns whether it was there."""
        seconds = self._limits.load_timeout + self._limits.request_timeout
        return Done(replica) in await self._order(UseAdapter(adapter, replica), seconds)

    async def _prefill(self, order: Prefill) -> None:
        """Prefills as far as that is possible: it only saves time."""
        with contextlib.suppress(SidecarError):
            await self._order(order, self._limits.request_timeout)

    async def _order(self, order: Order, seconds: float) -> list[Reply]:
        """The replies of all replicas.

        Raises:
            ModelUnavailable: there is no replica, or one of them has not replied in time.
            SidecarError: that of one of them.
        """
        try:
            bodies = await self._replicas.obey(encode(order), seconds)
        except TimeoutError:
            raise ModelUnavailable(
                f"Not every replica of {self._name} has replied within {seconds:g} s; try again.",
                retry_after=5,
            ) from None
        replies: list[Reply] = [REPLY.decode(body) for body in bodies]
        for reply in replies:
            if isinstance(reply, Refused):
                raise error_of(reply)
        return replies

    async def _look(self, seconds: float = _LOOK_SECONDS) -> dict[str, ModelStatus]:
        """The state of each replica."""
        replies = await self._order(Look(), seconds)
        return {one.replica: one.status for one in replies if isinstance(one, ReplicaState)}

    async def _watch(self) -> None:
        """Looks at the replicas, and gives new ones the prefix and the adapter."""
        while True:
            try:
                states = await self._look()
                self._welcome(states)
                self._states, self._looked = states, time.monotonic()
            except ModelUnavailable as error:
                log.debug("%s", error.detail)
            except Exception:  # otherwise the state would stay as it is for good
                log.exception("the replicas of %s cannot be asked", self._name)
            await asyncio.sleep(_LOOK_SECONDS)

    def _welcome(self, states: dict[str, ModelStatus]) -> None:
        now = time.monotonic()
        for replica in states.keys() - self._states.keys():
            self._strangers[replica] = now
            if self._prefix is not None:
                self._start(self._prefill(Prefill(self._prefix, replica)))
        # One that started while the adapter was changed may have loaded the former one.
        mine = _name(self._adapter)
        self._strangers = {
            replica: since
            for replica, since in self._strangers.items()
            if replica in states and _name(states[replica].adapter) != mine
        }
        if self._strangers and now - min(self._strangers.values()) > _SETTLE_SECONDS:
            self._strangers = dict.fromkeys(self._strangers, now)
            if not self._swap.locked():
                self._start(self._convert())

    async def _convert(self) -> None:
        try:
            await self._change(self._adapter)
        except SidecarError as error:
            log.error("a replica of %s keeps another adapter: %s", self._name, error.detail)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _name(adapter: Adapter | None) -> str | None:
    return None if adapter is None else adapter.name
