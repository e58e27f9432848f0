"""One server: its availability, its capabilities and its outstanding requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Literal
from urllib.parse import quote

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable, QueueFull, SidecarError, one_line
from llm_sidecar.models.base import Adapter, ModelIdentity, RefusedRequest, ServerStatus
from llm_sidecar.models.remote.adapters import LoadedAdapter, ServerAdapters
from llm_sidecar.models.remote.breaker import CircuitBreaker
from llm_sidecar.models.remote.capabilities import (
    Capabilities,
    choose_model,
    find_capabilities,
    list_models,
)
from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.refusals import Refused, Unreachable, broken
from llm_sidecar.telemetry.calls import ModelCall

log = logging.getLogger(__name__)

RUNTIME: Final = "remote"
_IDENTITY: Final = ModelIdentity(runtime=RUNTIME)
_CONTACT_SECONDS: Final = 120.0
"""Time limit for all probes of a server."""
_CHECK_SECONDS: Final = 10.0
"""Time limit for listing the models of an idle server."""
_RETRY_SECONDS: Final = 1.0
"""Seconds between a failed contact and the next one. They double if the server listed its models
but the probes failed, because the probes cost it time."""
_LONGEST_RETRY: Final = 30.0
_LEAST_SILENCE: Final = 10.0
"""Seconds without an answer that count as a failure of the server. With less time, it may be the
request that is too slow."""


class Server:
    """One server of a model.

    Attributes:
        connection: HTTP to it.
        capabilities: None before the first contact, and while it is away.
        model: the name of the model on the server.
        adapters: the adapters that it has loaded.
        reason: why it is away; None before the first contact, and while it is reachable.
        outstanding: number of running requests.
        last_asked: the time of the last request, on the clock of `time.monotonic`.
        outages: how often the connection was lost.
        decisions_refused: the number of questions that `/decisions` did not answer.
        retry_seconds: seconds until the next contact.
        lost: set while a server that was reachable is away.
    """

    def __init__(self, name: str, connection: Connection, model: str | None) -> None:
        """Contacts nothing.

        Args:
            name: `phi3` or `hermes`.
            model: its name on the server; None for the only one that it lists.
        """
        self.connection = connection
        self.capabilities: Capabilities | None = None
        self.model = model
        self.adapters = ServerAdapters(connection)
        self.reason: str | None = None
        self.outstanding = 0
        self.last_asked = 0.0
        self.outages = 0
        self.decisions_refused = 0
        self.retry_seconds = _RETRY_SECONDS
        self.lost = asyncio.Event()
        self._name = name
        self._configured_model = model
        self._breaker = CircuitBreaker()
        self._contacting = asyncio.Lock()
        # The models that it listed when it was last probed, and its capabilities then.
        self._last_probe: tuple[list[str], Capabilities] | None = None

    @property
    def label(self) -> str | None:
        """The name of its model in `X-Model`; None while it is unknown."""
        if self.model is None:
            return None
        # On some servers, the name of a model is its path.
        return f"{self._name}/{quote(self.model.rstrip('/').rpartition('/')[2])}"

    @property
    def served_name(self) -> str:
        """The model of a request: the name of the adapter, or of the model."""
        assert self.model is not None
        return self.model if self.adapters.in_use is None else self.adapters.in_use.served_name

    @property
    def is_new(self) -> bool:
        """Whether its first contact has not ended."""
        return self.capabilities is None and self.reason is None

    @property
    def takes_several(self) -> bool:
        """Whether it serves several requests at once now: not if its circuit is half-open."""
        return self._breaker.is_closed and self.refusal() is None

    @property
    def is_available(self) -> bool:
        """Whether it serves requests, even if it is full now."""
        refusal = self.refusal()
        return refusal is None or isinstance(refusal, QueueFull)

    def refusal(self) -> QueueFull | ModelUnavailable | None:
        """Why it gets no requests now; None if it gets them."""
        if self.capabilities is None:
            reason = self.reason or f"{self.connection.name} is being probed for its capabilities."
            return ModelUnavailable(reason, retry_after=5)
        return self._breaker.refusal()

    async def contact(self, adapter: Callable[[], Adapter | None]) -> None:
        """Finds out its capabilities, unless it is reachable already; sets `reason` if that fails.

        Args:
            adapter: returns the adapter in use, which is then loaded.
        """
        async with self._contacting:
            if self.capabilities is not None:
                return
            try:
                await self._probe_and_load(adapter, Deadline.after(_CONTACT_SECONDS))
            except (SidecarError, TimeoutError) as error:
                self._set_reason(error)
            else:
                self.reason = None
                self.lost.clear()
                self._breaker = CircuitBreaker()
                log.info("%s serves %s: %s", self.connection.name, self.label, self.capabilities)

    async def check(self) -> None:
        """Marks an idle server as away if it does not answer."""
        if self.outstanding or self.capabilities is None:
            return
        try:
            await list_models(self.connection, Deadline.after(_CHECK_SECONDS))
        except (QueueFull, Refused, RefusedRequest):
            # It answers.
            pass
        except (SidecarError, TimeoutError) as error:
            self._lose(error)

    def load(self, adapter: Adapter | None) -> Coroutine[Any, Any, LoadedAdapter | None]:
        """Loads an adapter on a server that is reachable now; see `ServerAdapters`."""
        assert self.capabilities is not None
        return self.adapters.load(adapter, can_load=self.capabilities.adapters)

    @contextlib.contextmanager
    def asking(self, call: ModelCall) -> Iterator[None]:
        """Begins a call, counts its request, and reports its outcome to the circuit breaker.

        A missed deadline is a failure only if the server had enough time and sent nothing.
        Otherwise the deadline was short, the server is busy, the text is long, or the client reads
        slowly.
        """
        self.outstanding += 1
        self.last_asked = started = time.monotonic()
        self._begin(call)
        try:
            with self._breaker.request():
                yield
        except Unreachable as error:
            self._lose(error)
            raise
        except QueueFull as error:
            self._breaker.is_full(error)
            raise
        except ModelUnavailable as error:
            self._breaker.failed(error)
            raise
        except TimeoutError:
            if call.first_token is None:
                self.fell_silent(time.monotonic() - max(started, self.connection.last_byte))
            raise
        else:
            self._breaker.succeeded()
        finally:
            self.outstanding -= 1

    def answers(self) -> None:
        """Records the beginning of an answer."""
        self._breaker.answers()

    def refuses_decision(self, error: Exception) -> None:
        """Counts a question that `/decisions` does not answer, and logs the first one."""
        self.decisions_refused += 1
        if self.decisions_refused == 1:
            why = one_line(error) if isinstance(error, SidecarError) else "It sends no decision."
            log.warning(
                "%s does not answer a question by /decisions; its log probabilities or its text "
                "are read instead: %s",
                self.connection.name,
                why,
            )

    def fell_silent(self, seconds: float) -> ModelUnavailable:
        """Records that the server sent nothing to any request for so long; returns the error
        of a request."""
        error = broken(self.connection.name, f"sent nothing for {seconds:.0f} s")
        if seconds >= _LEAST_SILENCE:
            self._breaker.failed(error)
        return error

    def status(self) -> ServerStatus:
        """The state now."""
        refusal, capabilities = self.refusal(), self.capabilities
        state: Literal["ready", "resting", "away"] = "ready" if refusal is None else "resting"
        return ServerStatus(
            url=self.connection.url,
            state="away" if capabilities is None else state,
            reason=None if refusal is None else refusal.detail,
            model=self.model,
            outstanding=self.outstanding,
            schema=None
            if capabilities is None
            else next(iter(capabilities.schema_formats), "prompt"),
            scores=None if capabilities is None else capabilities.scores,
            top_logprobs=None if capabilities is None else capabilities.top_logprobs,
            adapters=None if capabilities is None else capabilities.adapters,
            decisions_refused=self.decisions_refused,
        )

    def _begin(self, call: ModelCall) -> None:
        call.begun = time.monotonic()
        call.served_by, call.identity = self.label, _IDENTITY
        in_use = self.adapters.in_use
        call.adapter = None if in_use is None else in_use.adapter.name

    async def _probe_and_load(
        self, adapter: Callable[[], Adapter | None], deadline: Deadline
    ) -> None:
        later = min(2 * self.retry_seconds, _LONGEST_RETRY)
        self.retry_seconds = _RETRY_SECONDS
        listed = await self._listed(deadline)
        self.retry_seconds = later
        capabilities = await self._probed(listed, deadline)
        await self.adapters.reset()
        while True:
            wanted = adapter()
            loaded = await self.adapters.load(wanted, can_load=capabilities.adapters)
            if adapter() == wanted:
                break
        self.adapters.use(loaded)
        self.capabilities = capabilities

    async def _probed(self, listed: list[str], deadline: Deadline) -> Capabilities:
        """Its capabilities; it is probed again only if it may have changed since the last time."""
        if self._last_probe is None or self._last_probe[0] != listed:
            self.model = choose_model(self._name, self._configured_model, listed)
            capabilities = await find_capabilities(self.connection, self.model, deadline)
            self._last_probe = listed, capabilities
        return self._last_probe[1]

    async def _listed(self, deadline: Deadline) -> list[str]:
        """The models that it lists; none if it refuses and the settings name one."""
        try:
            return await list_models(self.connection, deadline)
        except (Refused, RefusedRequest):
            # `transformers serve` refuses if its model is in a folder.
            if self._configured_model is None:
                raise
            return []

    def _why(self, error: Exception) -> str:
        if isinstance(error, SidecarError):
            return one_line(error)
        return f"{self.connection.name} does not answer in time."

    def _set_reason(self, error: Exception) -> None:
        if isinstance(error, Unreachable) and error.refused:
            # Its process has ended. It may come back as another version, or with other options.
            self._last_probe = None
        reason = self._why(error)
        if reason != self.reason:
            log.warning("%s", reason)
        self.reason = reason

    def _lose(self, error: Exception) -> None:
        """Marks it as away."""
        if self.capabilities is not None:
            self.capabilities = None
            self.outages += 1
            self.lost.set()
        self._set_reason(error)
