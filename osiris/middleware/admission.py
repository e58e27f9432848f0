"""Admission control: a maximum number of running requests, and none while the server drains."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.telemetry.asgi import TrackedSend
from osiris.paths import is_probe_or_metrics
from osiris.refusals import refusal
from osiris.shutdown import Shutdown, shutting_down

_RETRY_FULL: Final = 1


class Admission:
    """Answers 429 beyond `max_requests` running requests, and 503 while the server drains.

    Probes and metrics always pass. A refusal does not read the body: `osiris.transport` discards
    it.
    """

    def __init__(self, app: ASGIApp, max_requests: int, shutdown: Shutdown) -> None:
        self._app = app
        self._max_requests = max_requests
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe_or_metrics(scope):
            await self._app(scope, receive, send)
        elif self._shutdown.draining:
            await _shutting_down(scope, receive, send)
        elif self._shutdown.running >= self._max_requests:
            detail = (
                f"{self._max_requests} requests are running, which is MAX_CONCURRENT_REQUESTS; "
                "try again later."
            )
            headers = {"Retry-After": str(_RETRY_FULL)}
            await refusal(scope, 429, detail, headers)(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = TrackedSend(send)
        with self._shutdown.request():
            try:
                await self._app(scope, receive, response)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._shutdown.draining or task is None:
                    raise
                # The grace period is over. A response that has started cannot be replaced.
                task.uncancel()
                if not response.started:
                    await _shutting_down(scope, receive, send)


async def _shutting_down(scope: Scope, receive: Receive, send: Send) -> None:
    error = shutting_down()
    headers = {"Retry-After": str(error.retry_after)}
    await refusal(scope, 503, error.detail, headers)(scope, receive, send)
