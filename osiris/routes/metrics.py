"""`/metrics`, which Prometheus scrapes."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, HTTPException, Response

from llm_sidecar.telemetry.metrics import CONTENT_TYPE, Metrics
from osiris.endpoint import endpoint
from osiris.paths import METRICS

_PROMETHEUS_TEXT: Final = {
    "type": "string",
    "description": "Prometheus' text format: a line for each series",
    "examples": ['http_requests_total{method="GET",status="2xx",handler="/speak"} 3.0'],
}


class _MetricsResponse(Response):
    """Prometheus' text."""


def install(app: FastAPI, metrics: Metrics | None) -> None:
    """Adds the path; without metrics it answers 404 and is not documented."""

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
