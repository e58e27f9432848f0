"""Admission control: a maximum number of running requests, and none while the server drains."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osiris.paths import is_probe_or_metrics
from osiris.shutdown import Shutdown

_ENDING: Final = "The server is shutting down; try again."
_RETRY_ENDING: Final = 5
"""Seconds until another server, or this one after a restart, is likely to answer."""
_RETRY_FULL: Final = 1
_BODY_SECONDS: Final = 1.0
_BODY_BYTES: Final = 1 << 20


class Admission:
    """Answers 429 beyond `max_requests` running requests, and 503 while the server drains. Probes
    and
    metrics always pass."""

    def __init__(self, app: ASGIApp, max_requests: int, shutdown: Shutdown) -> None:
        self._app = app
        self._max_requests = max_requests
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if is_probe_or_metrics(scope):
            await self._app(scope, receive, send)
        elif self._shutdown.draining:
            # The connection closes each answer while it drains: see `osiris.connection`.
            await _discard_body(receive)
            await _ending(scope, receive, send)
        elif self._shutdown.running >= self._max_requests:
            # The connection stays open, and uvicorn discards the body.
            await _refusal(
                429,
                f"{self._max_requests} requests are running, which is MAX_CONCURRENT_REQUESTS; "
                "try again later.",
                _RETRY_FULL,
            )(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        with self._shutdown.request():
            try:
                await self._app(scope, receive, send_and_note)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._shutdown.draining or task is None:
                    raise
                # The grace period is over. A response that has begun cannot be replaced.
                task.uncancel()
                if not begun:
                    await _ending(scope, receive, send)


def _refusal(status: int, detail: str, retry_after: int) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers={"Retry-After": str(retry_after)})


async def _ending(scope: Scope, receive: Receive, send: Send) -> None:
    await _refusal(503, _ENDING, _RETRY_ENDING)(scope, receive, send)


async def _discard_body(receive: Receive) -> None:
    """Reads the body, within limits: if a connection is closed while bytes are unread, it is reset,
    and
    the client may lose the answer."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BODY_SECONDS):
            while taken < _BODY_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
