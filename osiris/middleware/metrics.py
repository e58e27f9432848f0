"""Metrics of HTTP requests, and the path `/metrics`."""

from __future__ import annotations

import time
from typing import Final

from fastapi import FastAPI, HTTPException, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_sidecar import db, grounding
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.metrics import CONTENT_TYPE, Metrics, MetricsSink, NoMetrics
from osiris.endpoint import endpoint
from osiris.paths import METRICS, route_path

_UNCOUNTED: Final = frozenset({METRICS, "/health/live", "/health/ready"})
"""Paths that are requested every few seconds."""
_NO_ROUTE: Final = "none"
_TABLES: Final = (db.RUNS, db.SCORES, db.PROPOSALS)
"""Tables whose rows can be lost. Feedback is refused instead if it cannot be stored."""

_PROMETHEUS_TEXT: Final = {
    "type": "string",
    "description": "Prometheus' text format: a line for each series",
    "examples": ['http_requests_total{method="GET",status="2xx",handler="/speak"} 3.0'],
}


class _MetricsResponse(Response):
    """Prometheus' text."""


def sidecar_metrics() -> Metrics:
    """Metrics with the tables and the fields of the sidecar as label values."""
    return Metrics(tables=_TABLES, fields=grounding.FIELDS)


def install_metrics(app: FastAPI, settings: Settings) -> MetricsSink:
    """Serves `/metrics` and counts requests; where ENABLE_METRICS is off, `/metrics` is a 404.

    Call it after all other middleware is added, so that their refusals are counted too.

    Returns:
        The metrics sink for the app's sidecar.
    """
    metrics = sidecar_metrics() if settings.enable_metrics else None

    async def scrape_metrics() -> Response:
        """Every metric in Prometheus' text format."""
        if metrics is None:
            raise HTTPException(404, "Metrics are off; ENABLE_METRICS=true turns them on.")
        return _MetricsResponse(metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    endpoint(
        app.router,
        "GET",
        METRICS,
        content={CONTENT_TYPE: {"schema": _PROMETHEUS_TEXT}},
        documented=metrics is not None,
        tags=["operations"],
        response_class=_MetricsResponse,
        response_description="The metrics",
    )(scrape_metrics)
    if metrics is None:
        return NoMetrics()
    app.add_middleware(HttpMetrics, metrics=metrics)
    return metrics


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

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                handler = getattr(scope.get("route"), "path", _NO_ROUTE)
                seconds = time.perf_counter() - began
                self._metrics.answered(scope["method"], message["status"], handler, seconds)
            await send(message)

        await self._app(scope, receive, count_and_send)
