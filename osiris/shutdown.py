"""Graceful shutdown after a signal.

uvicorn stops listening as soon as it gets a signal. Connections of a load balancer that has not
noticed yet are then refused, and a client that does not read can delay the end for ever. So this
module handles the signals first, and hands over to uvicorn when every request is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import Any, Final

import anyio
from uvicorn import Server

from llm_sidecar.errors import Unavailable
from osiris.listening import block_new, waiting

log = logging.getLogger(__name__)

_HANDSHAKE: Final = 0.2
"""Seconds in which begun handshakes can finish after new connections are blocked."""
_IDLE: Final = 1.0
"""Seconds without a request after which a connection counts as idle."""
_LAST_ANSWERS: Final = 5.0
"""Maximum seconds to wait for the last requests on open connections."""
_POLL: Final = 0.02
"""Seconds."""
_CANCEL_LIMIT: Final = 2.0
"""Seconds that cancelled requests have to end."""
_DELIVERY: Final = 1.0
"""Seconds that clients have to read what has been written."""
_HURRY_LIMIT: Final = 5.0
"""Seconds that the components have to stop after a second signal. Acknowledged rows are durable
anyway."""
_RETRY_AFTER: Final = 5
"""Seconds until another server, or this one after a restart, should answer."""


def shutting_down() -> Unavailable:
    """The error of a request that arrives or still runs at a shutdown."""
    return Unavailable("The server is shutting down; try again.", retry_after=_RETRY_AFTER)


class Shutdown:
    """Shuts one app down in order; see `_run`.

    Attributes:
        draining: set by the first signal: new work is refused.
        streams_end: set at the same time, for streams that would never end.
    """

    def __init__(self, grace: float, drain: float) -> None:
        """Installs no signal handlers yet; see `install`.

        Args:
            grace: seconds that running requests have to finish.
            drain: minimum seconds in which the socket still accepts connections.
        """
        self.draining = False
        self.streams_end = anyio.Event()
        self._grace = grace
        self._drain = drain
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurry = asyncio.Event()
        self._signals: list[int] = []
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    def install(self) -> Server | None:
        """Replaces the signal handlers of the running uvicorn.

        Does nothing under another server, and where uvicorn does not handle signals: in a thread,
        in tests.

        Returns:
            The uvicorn server, or None.
        """
        server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if not isinstance(server, Server):
            return None
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            # Not in the context of the request that the signal interrupts.
            loop.call_soon_threadsafe(self._on_signal, number, context=contextvars.Context())

        # When it ends, uvicorn restores the handlers from before its own.
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handle)
            # nohup sets it to be ignored, on purpose.
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, handle)
            self._server = server
        return self._server

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts the current task as a running request; it is cancelled after the grace period."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self._running)

    def _on_signal(self, number: int) -> None:
        # Ctrl-C, or the end of a terminal, reaches both a reloader and the server that it started.
        # The SIGTERM that the reloader then sends is not a second request to stop.
        relayed = (
            number == signal.SIGTERM
            and self._signals in ([signal.SIGINT], [signal.SIGHUP])
            and multiprocessing.parent_process() is not None
        )
        self._signals.append(number)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="shutdown")
        elif not relayed:
            log.warning("second signal: running requests are cancelled")
            self._hurry.set()

    async def _run(self) -> None:
        """The steps of the shutdown."""
        began = time.monotonic()
        try:
            # 1. `/health/ready` turns 503, new work is refused with 503, audio streams end. The
            #    socket still accepts connections, so that load balancers notice.
            log.info("draining: new work is refused, %d requests still run", self.running)
            self.draining = True
            self.streams_end.set()
            # 2. Running requests finish, within the grace period (a second signal ends it).
            await self._unless_hurried(self._idle.wait(), self._grace)
            # 3. The others are cancelled and answered with 503.
            await self._cancel_running()
            # 4. For the rest of the drain time, new requests are still answered with 503.
            remaining = began + self._drain - time.monotonic()
            if remaining > 0:
                await self._unless_hurried(self._hurry.wait(), remaining)
            # 5. New connections are blocked; requests on existing connections are answered.
            if await self._unless_hurried(self._answer_the_last(), _LAST_ANSWERS):
                log.info("drained: every request is answered; the server ends")
            else:
                log.warning("the server ends before every request is answered")
        finally:
            # 6. uvicorn closes the socket and, after a moment for clients to read, the connections.
            self._hand_over()
            # 7. The lifespan ends and calls `Sidecar.close`: it stops the models' workers and the
            #    voices, publishes waiting events, stores waiting rows, and closes the database.
            # 8. uvicorn returns, with exit status 0.

    async def _cancel_running(self) -> None:
        for task in self._running:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _CANCEL_LIMIT)

    async def _answer_the_last(self) -> None:
        with self._listeners() as listeners:
            for listener in listeners:
                block_new(listener)
            await asyncio.sleep(_HANDSHAKE)
            # The kernel does not report when its queue gets empty, so poll.
            while any(map(waiting, listeners)) or any(  # noqa: ASYNC110
                map(self._expects_answer, self._connections())
            ):
                await asyncio.sleep(_POLL)

    @contextlib.contextmanager
    def _listeners(self) -> Iterator[list[socket.socket]]:
        """The listening sockets, without those inherited from another process, which may still use
        them."""
        assert self._server is not None
        config = self._server.config
        with contextlib.ExitStack() as stack:
            if config.fd is not None or multiprocessing.parent_process() is not None:
                yield []
                return
            # A signal may come before uvicorn listens.
            servers = getattr(self._server, "servers", [])
            sockets = [one for server in servers for one in server.sockets]
            # uvloop's socket objects have only a file descriptor.
            yield [
                stack.enter_context(socket.socket(fileno=os.dup(one.fileno()))) for one in sockets
            ]

    def _connections(self) -> list[Any]:
        assert self._server is not None
        return list(self._server.server_state.connections)

    def _expects_answer(self, connection: Any) -> bool:
        """Whether an answer is still being sent on a connection, or a request may still arrive."""
        idle = asyncio.get_running_loop().time() - connection.active_at
        return bool(connection.is_busy or connection.has_unsent_answer) or idle < _IDLE

    async def _unless_hurried(self, work: Coroutine[Any, Any, Any], seconds: float | None) -> bool:
        """Waits for the work, until the timeout or a second signal; returns whether it was done."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._hurry.wait())]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done = tasks[0].done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if done:
            # Raises an error of the work.
            tasks[0].result()
        return done

    def _hand_over(self) -> None:
        assert self._server is not None
        config = self._server.config
        if config.timeout_graceful_shutdown is None:
            # uvicorn passes it to asyncio, which accepts fractions of a second.
            config.timeout_graceful_shutdown = _DELIVERY  # type: ignore[assignment]
        self._server.should_exit = True

    async def close(self, stopping: Coroutine[Any, Any, None]) -> None:
        """Stops the components; after a second signal, for at most `_HURRY_LIMIT` more seconds."""
        closing = asyncio.ensure_future(stopping)
        if not await self._unless_hurried(asyncio.wait([closing]), None):
            await asyncio.wait([closing], timeout=_HURRY_LIMIT)
        if not closing.done():
            log.error("some components did not stop in time; the server exits without them")
            closing.cancel()
            return
        await closing
