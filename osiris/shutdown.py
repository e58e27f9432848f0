"""How the server ends when it is told to.

uvicorn stops listening as soon as a signal comes: a load balancer that has not yet noticed sends
requests into refused connections, and a client that does not read keeps the server for ever. So
the signals come here first, and uvicorn gets its turn once there is nothing left to cut off.
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

from osiris.listening import keep_out_new, waiting

log = logging.getLogger(__name__)

_HANDSHAKE: Final = 0.2
"""Seconds that a client has to finish connecting, once no other may start to."""
_IDLE: Final = 1.0
"""Seconds without a request after which an open connection is taken for idle."""
_LAST_ANSWERS: Final = 5.0
"""Seconds that the last requests of open connections can hold up the end."""
_POLL: Final = 0.02
_CUT_LIMIT: Final = 2.0
"""Seconds that a request has to end once it is cancelled."""
_DELIVERY: Final = 1.0
"""Seconds that clients get to read what has been written."""
_HURRY_LIMIT: Final = 5.0
"""Seconds that the parts get to stop after a second signal; what is acknowledged is durable."""


class Shutdown:
    """Ends one app in order; see `_run`.

    Attributes:
        draining: set once the server has been told to end: refuse new work.
        streams_end: set at the same moment, for streams that would never end.
    """

    def __init__(self, grace: float, drain: float) -> None:
        """Installs nothing.

        Args:
            grace: seconds that running requests get.
            drain: seconds, at least, in which the socket still accepts.
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
        """Puts itself in front of the running uvicorn's signal handlers.

        Does nothing under another server, and where signals are not handled: in a thread, in tests.

        Returns:
            The uvicorn.
        """
        server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if not isinstance(server, Server):
            return None
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            # Not in the context of the request that the signal has interrupted.
            loop.call_soon_threadsafe(self._told, number, context=contextvars.Context())

        # uvicorn puts back what was there before it when it has ended.
        with contextlib.suppress(ValueError):  # no main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handle)
            # nohup has it ignored, and means it.
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, handle)
            self._server = server
        return self._server

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """The running request, which is cancelled when its grace period is over."""
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
        """Requests at work."""
        return len(self._running)

    def _told(self, number: int) -> None:
        # Ctrl-C, or the end of a terminal, reaches a reloader and the server it started; its own
        # SIGTERM to the server says the same thing again.
        relayed = (
            number == signal.SIGTERM
            and self._signals in ([signal.SIGINT], [signal.SIGHUP])
            and multiprocessing.parent_process() is not None
        )
        self._signals.append(number)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="shutdown")
        elif not relayed:
            log.warning("told to end a second time; running requests are cut off")
            self._hurry.set()

    async def _run(self) -> None:
        """The order in which the server ends."""
        began = time.monotonic()
        try:
            # 1. `/health/ready` turns 503, new work is refused with 503, audio streams end. The
            #    socket still accepts, so that load balancers see it and nobody is cut off.
            log.info("draining: new work is refused, %d requests still run", self.running)
            self.draining = True
            self.streams_end.set()
            # 2. Running requests end, within the grace period (a second signal ends it now).
            await self._unless_hurried(self._idle.wait(), self._grace)
            # 3. What still runs is answered with 503.
            await self._cut_off()
            # 4. Until load balancers have noticed, new requests are answered with 503.
            remaining = began + self._drain - time.monotonic()
            if remaining > 0:
                await self._unless_hurried(self._hurry.wait(), remaining)
            # 5. Nobody new connects; every connection that is there gets its answer.
            if await self._unless_hurried(self._answer_the_last(), _LAST_ANSWERS):
                log.info("drained: every request is answered; the server ends")
            else:
                log.warning("the server ends before every request is answered")
        finally:
            # 6. uvicorn closes the socket and the connections, which get a moment to be read.
            self._hand_over()
            # 7. The lifespan ends, and in it `Sidecar.close`: the models' workers, the voices, the
            #    event bus with what it has to tell, the database with its rows.
            # 8. uvicorn returns, with exit status 0.

    async def _cut_off(self) -> None:
        for task in self._running:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _CUT_LIMIT)

    async def _answer_the_last(self) -> None:
        with self._own_listeners() as listeners:
            for listener in listeners:
                keep_out_new(listener)
            await asyncio.sleep(_HANDSHAKE)
            # The kernel tells nobody when its queue is empty, so look.
            while any(map(waiting, listeners)) or any(  # noqa: ASYNC110
                map(self._expects_answer, self._connections())
            ):
                await asyncio.sleep(_POLL)

    @contextlib.contextmanager
    def _own_listeners(self) -> Iterator[list[socket.socket]]:
        """The sockets that this process listens on, but those that it has from another one: that
        goes on listening, or has another server do so."""
        assert self._server is not None
        config = self._server.config
        with contextlib.ExitStack() as stack:
            if config.fd is not None or multiprocessing.parent_process() is not None:
                yield []
                return
            # A signal may come before uvicorn listens at all.
            servers = getattr(self._server, "servers", [])
            sockets = [one for server in servers for one in server.sockets]
            # uvloop's have a number and nothing else.
            yield [
                stack.enter_context(socket.socket(fileno=os.dup(one.fileno()))) for one in sockets
            ]

    def _connections(self) -> list[Any]:
        assert self._server is not None
        return list(self._server.server_state.connections)

    def _expects_answer(self, connection: Any) -> bool:
        """Whether a request runs on a connection, or is likely to come."""
        idle = asyncio.get_running_loop().time() - connection.active_at
        return bool(connection.is_busy) or idle < _IDLE

    async def _unless_hurried(self, work: Coroutine[Any, Any, Any], seconds: float | None) -> bool:
        """Whether the work was done by then, and before a second signal."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._hurry.wait())]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done = tasks[0].done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if done:
            # Raises what the work has raised.
            tasks[0].result()
        return done

    def _hand_over(self) -> None:
        assert self._server is not None
        config = self._server.config
        if config.timeout_graceful_shutdown is None:
            # It is passed on to asyncio, so fractions of a second are fine.
            config.timeout_graceful_shutdown = _DELIVERY  # type: ignore[assignment]
        self._server.should_exit = True

    async def close(self, parts: Coroutine[Any, Any, None]) -> None:
        """Stops the parts, for at most a few seconds more once a second signal comes."""
        closing = asyncio.ensure_future(parts)
        if not await self._unless_hurried(asyncio.wait([closing]), None):
            await asyncio.wait([closing], timeout=_HURRY_LIMIT)
        if not closing.done():
            log.error("some parts have not stopped in time; they are left as they are")
            closing.cancel()
            return
        await closing
