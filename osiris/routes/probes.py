"""Probes, which orchestrators and load balancers request every second."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from llm_sidecar.sidecar import Sidecar
from osiris.endpoint import endpoint
from osiris.middleware.access import caller
from osiris.schemas.health import Health, HealthSummary, Probe

_JSON: Final = "application/json"


class ProbeRoute(APIRoute):
    """A documented route whose function answers the request itself.

    It skips FastAPI's handling of dependencies, bodies and parameters, which would take longer than
    the answer.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the route's methods; FastAPI refuses other methods."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def install(app: FastAPI) -> None:
    """Adds the probes. Call it before other routes are added: routing tries them in order."""
    shared: dict[str, Any] = {"tags": ["operations"], "route_class_override": ProbeRoute}
    whole: dict[str, Any] = {"response_model": Health | HealthSummary}
    endpoint(app.router, "GET", "/health", response_description="The state", **whole, **shared)(
        health
    )
    probe: dict[str, Any] = {"error_model": Probe, "response_model": Probe}
    endpoint(
        app.router,
        "GET",
        "/health/live",
        response_description="The process answers",
        **probe,
        **shared,
    )(health_live)
    endpoint(
        app.router, "GET", "/health/ready", 503, response_description="Ready", **probe, **shared
    )(health_ready)


async def health(request: Request) -> Response:
    """The overall state and the state of each component; always 200.

    If the server has API keys, a request without one gets only `status`.
    """
    sidecar: Sidecar = request.app.state.sidecar
    health = sidecar.health
    shown = health.report() if _may_see_all(request) else {"status": health.status()}
    return Response(to_json(shown), media_type=_JSON)


async def health_live(request: Request) -> Response:
    """Whether the process answers requests."""
    return _answer(200, Probe(status="ok"))


async def health_ready(request: Request) -> Response:
    """Whether the next proposal and the next feedback would succeed within their deadlines.

    A model that is loaded on demand counts as ready while its files exist. The status is `draining`
    once the server shuts down. If it has API keys, only a request with one gets `reasons`.
    """
    if request.app.state.shutdown.draining:
        return _answer(503, Probe(status="draining"))
    sidecar: Sidecar = request.app.state.sidecar
    missing = sidecar.health.missing()
    if missing:
        reasons = missing if _may_see_all(request) else None
        return _answer(503, Probe(status="unavailable", missing=list(missing), reasons=reasons))
    return _answer(200, Probe(status="ok"))


def _may_see_all(request: Request) -> bool:
    """If keys are set, only callers with a key may see paths and versions."""
    sidecar: Sidecar = request.app.state.sidecar
    return not sidecar.settings.access.api_keys or caller(request.scope) is not None


def _answer(status: int, probe: Probe) -> Response:
    return Response(probe.model_dump_json(exclude_none=True), status, media_type=_JSON)
