"""Metrics of HTTP requests."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_sidecar import db, grounding
from llm_sidecar.telemetry.metrics import Metrics
from osiris.paths import METRICS, route_path

_UNCOUNTED: Final = frozenset({METRICS, "/health/live", "/health/ready"})
"""Paths that are requested every few seconds."""
_CLIENT_CLOSED_REQUEST: Final = 499
_NO_ROUTE: Final = "none"
_TABLES: Final = (db.RUNS, db.SCORES, db.PROPOSALS)
"""Tables whose rows can be lost. Feedback is refused instead if it cannot be stored."""


def sidecar_metrics() -> Metrics:
    """Metrics with the tables and the fields of the sidecar as label values."""
    return Metrics(tables=_TABLES, fields=grounding.FIELDS)


class HttpMetrics:
    """Counts each request when its response starts, because a stream lasts for hours.

    It reads the route that the router has put into the scope: that takes a fifth of the time of
    matching the path again.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope).rstrip("/") in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        has_started = False

        def count(status: int) -> None:
            nonlocal has_started
            has_started = True
            handler = getattr(scope.get("route"), "path", _NO_ROUTE)
            self._metrics.answered(scope["method"], status, handler, time.perf_counter() - began)

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, count_and_send)
        except asyncio.CancelledError:
            # Ray Serve cancels the request of a client that disconnects.
            if not has_started:
                count(_CLIENT_CLOSED_REQUEST)
            raise
