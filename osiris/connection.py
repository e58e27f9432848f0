"""HTTP connections with limits: uvicorn's h11 protocol with bounds on size, time and number.

uvicorn's other parser, httptools, answers a bare `/health` in half the processor time (0.14 ms
against 0.27 ms a request). It also loses the body of a request that offers an `Upgrade`, adds a
chunked body's trailers to the request's headers, and limits neither headers nor pipelined requests.
h11 has none of these faults, and a proposal takes far longer than the 0.13 ms that it costs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import select
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llm_sidecar.memory_trim import trim_heap
from llm_sidecar.settings import Settings
from osiris.http_parser import CLOSE, MAX_HEAD_BYTES, Parser
from osiris.open_files import allow_files
from osiris.paths import is_probe_or_metrics
from osiris.refusals import refusal
from osiris.transport import WatchedTransport

log = logging.getLogger(__name__)

_RESERVED: Final = 64
"""Connections beyond MAX_CONNECTIONS, on which only probes and metrics are answered."""
_RESERVED_SECONDS: Final = 2.0
"""Seconds that a client has to send its request on a reserved connection."""
_TRIM_AFTER: Final = 0.5
"""Seconds."""
_POLL_SECONDS: Final = (0.05, 0.2, 0.5)
"""Seconds between checks for a reset; the last value repeats."""
_FULL: Final = "The server has as many connections as MAX_CONNECTIONS allows; try again later."


@dataclass
class ConnectionLimits:
    """The limits and the state that all connections of a server share.

    Attributes:
        max_connections: number of connections with normal service; further ones are reserved.
        head_seconds: how long a client has to send the headers of a request, or the rest of a body
            that is no longer needed.
        stall_seconds: how long a client may read nothing of an answer.
        draining: whether each answer is the last one on its connection.
        reserved: the connections beyond `max_connections`, oldest first.
        trim: the timer that returns freed memory to the system, if one runs.
    """

    max_connections: int
    head_seconds: float
    stall_seconds: float
    draining: Callable[[], bool]
    reserved: dict[Connection, None] = field(default_factory=dict)
    trim: asyncio.TimerHandle | None = None

    def on_stall(self) -> None:
        """Logs a client that does not read; soon returns the memory of its answer to the system."""
        log.info(
            "a client read nothing of its answer for %g s; its connection is reset",
            self.stall_seconds,
        )
        if self.trim is None:
            self.trim = asyncio.get_running_loop().call_later(_TRIM_AFTER, self._trim)

    def _trim(self) -> None:
        self.trim = None
        trim_heap()


def limit_connections(config: Config, settings: Settings, draining: Callable[[], bool]) -> None:
    """Applies the limits to all connections that the server accepts from now on."""
    limits = ConnectionLimits(
        max_connections=settings.limits.max_connections,
        head_seconds=settings.limits.header_timeout,
        stall_seconds=settings.limits.send_timeout,
        draining=draining,
    )
    if config.h11_max_incomplete_event_size is None:
        config.h11_max_incomplete_event_size = MAX_HEAD_BYTES
    # uvicorn only calls it, once for each connection, so it need not be a class.
    config.http_protocol_class = functools.partial(  # type: ignore[assignment]
        Connection, limits=limits
    )
    allow_files(settings.limits.max_connections + _RESERVED)


class Connection(H11Protocol):
    """A client's connection.

    Attributes:
        active_at: the loop's time of the last byte from the client, or of the last answer.
    """

    transport: WatchedTransport  # type: ignore[assignment]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self.conn: Parser = Parser(config.h11_max_incomplete_event_size or MAX_HEAD_BYTES)
        self._served = cast(ASGIApp, self.app)
        self.app = self._answer
        self._timer: asyncio.TimerHandle | None = None
        self._is_reserved = False
        self._poll_seconds = list(_POLL_SECONDS)
        self.active_at = self.loop.time()

    @property
    def is_busy(self) -> bool:
        """Whether some request still lacks its complete answer.

        An answer that fails midway is never complete: its connection closes.
        """
        if self.cycle is None or self.transport.is_closing():
            return False
        return not self.cycle.response_complete

    @property
    def has_unsent_answer(self) -> bool:
        """Whether bytes of a complete answer still wait in asyncio's buffer for a slow client."""
        is_whole = self.cycle is not None and self.cycle.response_complete
        return is_whole and self.transport.unsent() > 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        watched = WatchedTransport(
            cast(asyncio.Transport, transport),
            self.loop,
            self._limits.stall_seconds,
            still_sending=self._is_client_sending,
            on_stall=self._limits.on_stall,
        )
        super().connection_made(watched)  # type: ignore[arg-type]
        if len(self.connections) > self._limits.max_connections:
            self._become_reserved()
        self._watch_client()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport.lost()
        self._limits.reserved.pop(self, None)
        self._unwatch_client()
        super().connection_lost(exc)
        # uvicorn leaves this timer running after an error.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self.transport.discard(len(data))
            return
        self.active_at = self.loop.time()
        super().data_received(data)
        self._watch_client()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Whether the connection stays open after the client has closed its sending side.

        The client may still wait for the answer, or it may have disconnected. To tell the two
        apart, the server has to send something: after a `100 Continue`, the system of a client that
        has disconnected replies with a reset, and a waiting client ignores it.
        """
        waits = self.is_busy and not self.cycle.more_body and not self.cycle.response_started
        if not waits or self.scheme == "https":
            return None
        if self.conn.their_http_version == b"1.1":
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim) or b"")
        # The client sends no further request on this connection.
        self.cycle.keep_alive = False
        self._abort_if_reset()
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.active_at = self.loop.time()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not valid HTTP or too long; uvicorn calls it."""
        refusal = self.conn.refusal
        self._refuse(refusal.error_status_hint if refusal is not None else 400)

    def _should_upgrade(self) -> bool:
        """Never: a server may ignore `Upgrade` and answer the request over HTTP/1.1."""
        return False

    def _become_reserved(self) -> None:
        reserved = self._limits.reserved
        if not reserved:
            log.warning(
                "%d connections are open, which is MAX_CONNECTIONS; on further ones only probes "
                "and metrics are answered",
                self._limits.max_connections,
            )
        reserved[self] = None
        self._is_reserved = True
        if len(reserved) > _RESERVED:
            silent = next((other for other in reserved if not other.is_busy), self)
            del reserved[silent]
            silent.transport.abort()

    def _answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Calls the app; adds `Connection: close` to the last answer on a connection.

        Not a coroutine, to keep its cost low: every request passes here, even the probes.
        """

        def send_last(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and self._is_last():
                others = (entry for entry in message["headers"] if entry[0].lower() != CLOSE[0])
                message = {**message, "headers": [*others, CLOSE]}
            return send(message)

        app = self._served
        if self._is_reserved and not is_probe_or_metrics(scope):
            app = refusal(scope, 503, _FULL, {"Retry-After": "1"})
        return app(scope, receive, send_last)

    def _is_last(self) -> bool:
        return self._is_reserved or self._limits.draining() or not self.cycle.keep_alive

    def _is_client_sending(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _watch_client(self) -> None:
        """Limits the time for the headers of a request, and for the rest of a body after the
        answer.

        The app limits the time of a body that it reads.
        """
        waits = not self.is_busy and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not waits or self.transport.is_closing():
            self._unwatch_client()
        elif self._timer is None:
            seconds = self._limits.head_seconds
            if self._is_reserved:
                seconds = min(seconds, _RESERVED_SECONDS)
            self._timer = self.loop.call_later(seconds, self._time_out)

    def _unwatch_client(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408)
        else:
            self.transport.close()

    def _abort_if_reset(self) -> None:
        """Aborts the connection if the client has reset it, and checks again later.

        asyncio does not watch a connection after its end of file.
        """
        if self.transport.is_closing() or not self.is_busy:
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):
            self.transport.abort()
            return
        waits = self._poll_seconds
        seconds = waits.pop(0) if len(waits) > 1 else waits[0]
        self.loop.call_later(seconds, self._abort_if_reset)

    def _refuse(self, status: int) -> None:
        if self.is_busy:
            # The app waits for the rest of the body. It must not send a second answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        scope = cast(Scope, self.scope) if self.conn.our_state is h11.SEND_RESPONSE else None
        events = self.conn.refusal_events(status, self.server_state.default_headers, scope)
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._unwatch_client()
        self.transport.close()
