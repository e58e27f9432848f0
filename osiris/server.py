"""The application that `python -m osiris` and `uvicorn osiris.server:app` serve."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from llm_sidecar import __version__
from llm_sidecar.errors import SettingsError
from llm_sidecar.logs import log_unhandled, start_detached
from llm_sidecar.memory_trim import keep_little
from llm_sidecar.models.base import Models
from llm_sidecar.models.registry import MakeModels
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry import instruments
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.metrics import MetricsSink
from osiris import docs_page, errors, logs, openapi
from osiris.connection import limit_connections
from osiris.middleware.access import ApiKeys
from osiris.middleware.access_log import AccessLog
from osiris.middleware.admission import Admission
from osiris.middleware.body_limit import BodyLimit
from osiris.middleware.hosts import AllowedHosts
from osiris.middleware.metrics import HttpMetrics, sidecar_metrics
from osiris.middleware.request_id import RequestId
from osiris.middleware.security_headers import SecurityHeaders
from osiris.middleware.unexpected_errors import UnexpectedErrors
from osiris.openai import errors as openai_errors
from osiris.openai.routers import ROUTERS as OPENAI_ROUTERS
from osiris.paths import drop_repeated_root_path
from osiris.routes import (
    adapters,
    events,
    examples,
    feedback,
    generation,
    probes,
    profiling,
    scoring,
    speech,
)
from osiris.routes import metrics as metrics_route
from osiris.shutdown import Shutdown

_EXPOSED_HEADERS: Final = (
    "Allow",
    "Idempotent-Replayed",
    "Retry-After",
    "WWW-Authenticate",
    "X-Completion-Tokens",
    "X-Feedback-ID",
    "X-Finish-Reason",
    "X-Grounded",
    "X-Hermes-Answer-Mass",
    "X-Hermes-Score",
    "X-Hermes-Score-Reliable",
    "X-Model",
    "X-Prompt-Tokens",
    "X-Request-ID",
    "X-Stored",
    "X-Voice",
    "X-Voice-Reference",
    "traceresponse",
)
"""Response headers that a script of another origin may read."""
_ACCEPTED_HEADERS: Final = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "OpenAI-Organization",
    "OpenAI-Project",
    "X-API-Key",
    "X-Request-ID",
    # OpenAI's client for browsers sends these with every request.
    *(
        f"X-Stainless-{name}"
        for name in (
            "Arch",
            "Helper-Method",
            "Lang",
            "OS",
            "Package-Version",
            "Retry-Count",
            "Runtime",
            "Runtime-Version",
            "Timeout",
        )
    ),
    "baggage",
    "traceparent",
    "tracestate",
)
"""Request headers that a script of another origin may send."""


class _App(FastAPI):
    """FastAPI that also works behind a proxy that does not strip the root path."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the lifespan."""
        if scope["type"] == "http" and scope.get("root_path"):
            drop_repeated_root_path(scope, self._first_segments)
        await super().__call__(scope, receive, send)

    @functools.cached_property
    def _first_segments(self) -> frozenset[str]:
        return frozenset(path.split("/")[1] for path in openapi.documented_paths(self))


def create_app(settings: Settings, models: Models | MakeModels | None = None) -> FastAPI:
    """The application; its components start and stop with its lifespan.

    Args:
        settings: of the whole server.
        models: phi3 and hermes, or what builds them; default: those that the settings specify.
    """
    telemetry = instruments.build(settings)
    shutdown = Shutdown(settings.limits.shutdown_grace, settings.limits.shutdown_drain)
    metrics = sidecar_metrics() if settings.telemetry.metrics else None
    app = _App(
        version=__version__,
        lifespan=_lifespan(settings, models, metrics or MetricsSink(), telemetry, shutdown),
        redirect_slashes=False,
        # `docs_page` has the routes of the page and the document.
        openapi_url=None,
        generate_unique_id_function=openapi.operation_id,
        # FastAPI's own telemetry could be turned on by a variable, and would export error messages.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    probes.install(app)
    # The routes of the models come first: a request is compared with each route in turn, and
    # there are a hundred.
    app.include_router(generation.router)
    for router in OPENAI_ROUTERS:
        app.include_router(router)
    for routes in (scoring, feedback, examples, events, speech, adapters, profiling):
        app.include_router(routes.router)
    errors.install(app)
    openai_errors.install(app)
    app.state.shutdown = shutdown
    app.openapi = openapi.document(app, settings)  # type: ignore[method-assign]
    docs_page.install(app)
    _add_middleware(app, settings, shutdown, telemetry)
    metrics_route.install(app, metrics)
    if metrics is not None:
        # The outermost, so that the refusals of all other middleware count.
        app.add_middleware(HttpMetrics, metrics=metrics)
    return app


def _lifespan(
    settings: Settings,
    models: Models | MakeModels | None,
    metrics: MetricsSink,
    telemetry: Instrument,
    shutdown: Shutdown,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Starts the sidecar with the server, and stops it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(log_unhandled)
        keep_little()
        telemetry.start()
        sidecar = Sidecar(settings, models=models, metrics=metrics, telemetry=telemetry)
        metrics.watch(sidecar.health.report)
        app.state.sidecar = sidecar
        if uvicorn := shutdown.install():
            limit_connections(uvicorn.config, settings, lambda: shutdown.draining)
        draining = start_detached(_drain(shutdown, sidecar))
        try:
            await sidecar.start()
            yield
        finally:
            draining.cancel()
            await shutdown.close(sidecar.close())
            await telemetry.close()

    return lifespan


async def _drain(shutdown: Shutdown, sidecar: Sidecar) -> None:
    """Drains the sidecar once the server drains."""
    await shutdown.streams_end.wait()
    sidecar.drain()


def _add_middleware(
    app: FastAPI, settings: Settings, shutdown: Shutdown, telemetry: Instrument
) -> None:
    """Adds middleware from the innermost to the outermost.

    The order ensures that a request is refused before its body is read, and that every answer has
    all headers and a log line.
    """
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.limits.max_body_bytes,
        larger={"/speak": speech.SPEAK_BODY_BYTES},
        seconds=settings.limits.body_timeout,
    )
    app.add_middleware(
        Admission, max_requests=settings.limits.max_concurrent_requests, shutdown=shutdown
    )
    if settings.access.api_keys:
        app.add_middleware(
            ApiKeys,
            keys=settings.access.api_keys,
            metrics_need_key=settings.access.metrics_need_key,
        )
    if settings.access.allowed_hosts:
        app.add_middleware(AllowedHosts, hosts=settings.access.allowed_hosts)
    telemetry.install(app)
    # Outside of telemetry, which reports errors; inside of all that adds headers.
    app.add_middleware(UnexpectedErrors)
    if settings.access.cors_origins:
        # Without credentials: scripts set the header with the key, browsers do not add it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.access.cors_origins,
            allow_methods=["DELETE", "GET", "HEAD", "POST"],
            allow_headers=_ACCEPTED_HEADERS,
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(AccessLog, routes=functools.cache(lambda: openapi.documented_paths(app)))
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestId)


def __getattr__(name: str) -> Any:
    """Creates `app` when a server asks for it, so that importing this module reads no
    environment."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        sys.exit(error.detail)
    logs.configure(settings.telemetry.log_format)
    app = create_app(settings)
    globals()["app"] = app
    return app
