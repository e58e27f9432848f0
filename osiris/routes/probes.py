"""Probes: what orchestrators, load balancers and people ask every second of the day."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from llm_sidecar.sidecar import Sidecar
from osiris.access import caller
from osiris.health_schemas import Health, HealthSummary, Probe
from osiris.http import endpoint

_JSON: Final = "application/json"


class ProbeRoute(APIRoute):
    """A route that is documented like any other, and whose function answers a request itself.

    It has no dependencies, no body and nothing to check, all of which would take FastAPI longer
    than the answer.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; another method than the route's gets FastAPI's own refusal."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def install(app: FastAPI) -> None:
    """Adds the probes; call it before other routes, as a path is compared with one by one."""
    shared: dict[str, Any] = {"tags": ["operations"], "route_class_override": ProbeRoute}
    whole: dict[str, Any] = {"response_model": Health | HealthSummary}
    endpoint(app.router, "GET", "/health", response_description="The state", **whole, **shared)(
        health
    )
    probe: dict[str, Any] = {"error_model": Probe, "response_model": Probe}
    endpoint(
        app.router, "GET", "/health/live", response_description="It serves", **probe, **shared
    )(health_live)
    endpoint(
        app.router, "GET", "/health/ready", 503, response_description="Ready", **probe, **shared
    )(health_ready)


async def health(request: Request) -> Response:
    """The state of the whole and of each part; always 200.

    Where API keys are set, a request without one gets `status` alone.
    """
    sidecar: Sidecar = request.app.state.sidecar
    shown = sidecar.health() if _may_see_all(request) else {"status": sidecar.status()}
    return Response(to_json(shown), media_type=_JSON)


async def health_live(request: Request) -> Response:
    """Whether the process serves requests at all."""
    return _answer(200, Probe(status="ok"))


async def health_ready(request: Request) -> Response:
    """Whether the next proposal and the next feedback would succeed within their deadlines.

    A model that is loaded on demand counts as ready while its files are there. `draining` once the
    server is shutting down. Where API keys are set, `reasons` needs one.
    """
    if request.app.state.shutdown.draining:
        return _answer(503, Probe(status="draining"))
    sidecar: Sidecar = request.app.state.sidecar
    missing = sidecar.missing()
    if missing:
        reasons = missing if _may_see_all(request) else None
        return _answer(503, Probe(status="unavailable", missing=list(missing), reasons=reasons))
    return _answer(200, Probe(status="ok"))


def _may_see_all(request: Request) -> bool:
    """Paths and versions are not for everybody where keys are set."""
    sidecar: Sidecar = request.app.state.sidecar
    return not sidecar.settings.api_keys or caller(request.scope) is not None


def _answer(status: int, probe: Probe) -> Response:
    return Response(probe.model_dump_json(exclude_none=True), status, media_type=_JSON)
