"""The application that `python -m osiris` serves, and `uvicorn osiris.server:app` as well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from llm_sidecar.errors import SettingsError, SidecarError
from llm_sidecar.logs import log_unhandled
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry import instruments
from llm_sidecar.telemetry.instruments import Instrument
from osiris import logs, openapi
from osiris.access import ApiKeys
from osiris.admission import Admission
from osiris.connection import limit_connections
from osiris.http import ClientGone, stored_header
from osiris.logs import AccessLog
from osiris.metrics import install_metrics
from osiris.middleware import SECURITY_HEADERS, BodyLimit, RequestId, SecurityHeaders
from osiris.routes import (
    adapters,
    examples,
    feedback,
    generation,
    probes,
    profiling,
    scoring,
    speech,
)
from osiris.shutdown import Shutdown

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST: Final = 499
_EXPOSED_HEADERS: Final = (
    "Retry-After",
    "X-Completion-Tokens",
    "X-Feedback-ID",
    "X-Finish-Reason",
    "X-Grounded",
    "X-Hermes-Score",
    "X-Model",
    "X-Prompt-Tokens",
    "X-Request-ID",
    "X-Stored",
    "X-Voice",
    "X-Voice-Reference",
)
"""What a script of another origin may read."""


def create_app(settings: Settings) -> FastAPI:
    """The application; its parts start and stop with its lifespan."""
    telemetry = instruments.build(settings)
    shutdown = Shutdown(settings.shutdown_grace, settings.shutdown_drain)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(log_unhandled)
        telemetry.start()
        sidecar = Sidecar(settings, metrics, telemetry)
        metrics.watch(sidecar.health)
        app.state.sidecar = sidecar
        if uvicorn := shutdown.install():
            limit_connections(uvicorn.config, settings, lambda: shutdown.draining)
        try:
            await sidecar.start()
            yield
        finally:
            await shutdown.close(sidecar.close())
            await telemetry.close()

    app = FastAPI(
        title="Osiris LLM sidecar",
        version=_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own would export the texts of errors, if its variable asked it to.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    probes.install(app)
    for routes in (generation, scoring, feedback, examples, speech, adapters, profiling):
        app.include_router(routes.router)
    app.add_exception_handler(SidecarError, _sidecar_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(400, _unreadable_body)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _unexpected_error)
    app.state.shutdown = shutdown
    app.openapi = openapi.document(app, settings)  # type: ignore[method-assign]
    _add_middleware(app, settings, shutdown, telemetry)
    metrics = install_metrics(app, settings)
    return app


def _add_middleware(
    app: FastAPI, settings: Settings, shutdown: Shutdown, telemetry: Instrument
) -> None:
    """From the innermost to the outermost: what is refused is refused before the body is read, and
    answered with every header and a line in the log."""
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        larger={"/speak": speech.SPEAK_BODY_BYTES},
        seconds=settings.body_timeout,
    )
    app.add_middleware(Admission, max_requests=settings.max_concurrent_requests, shutdown=shutdown)
    if settings.api_keys:
        app.add_middleware(
            ApiKeys, keys=settings.api_keys, metrics_need_key=settings.metrics_need_key
        )
    if settings.cors_origins:
        # A key travels in a header that scripts set; browsers need not add anything to it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["DELETE", "GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(AccessLog, routes=functools.cache(lambda: _spellings(app)))
    # Around the line in the log, which carries the trace's id.
    telemetry.install(app)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestId)


def _spellings(app: FastAPI) -> dict[str, str]:
    """The documented spelling of each path, by its spelling without the last slash."""
    of_its_own = filter(None, (app.docs_url, app.redoc_url, app.openapi_url))
    return {path.rstrip("/"): path for path in (*app.openapi()["paths"], *of_its_own)}


def _version() -> str:
    try:
        return version("osiris-llm-sidecar")
    except PackageNotFoundError:
        # A checkout that is run without being installed.
        return "0.0.0"


async def _sidecar_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SidecarError)
    headers = stored_header(error.stored)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    body = {"detail": error.detail}
    if error.transaction_id is not None:
        body["transaction_id"] = str(error.transaction_id)
    return JSONResponse(body, status_code=error.status, headers=headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """Every bad field and why, without the input: that may be a prompt."""
    assert isinstance(error, RequestValidationError)
    entries = [
        {"loc": list(entry["loc"]), "msg": entry["msg"], "type": entry["type"]}
        for entry in error.errors()
    ]
    return JSONResponse({"detail": entries}, status_code=422)


async def _unreadable_body(request: Request, error: Exception) -> Response:
    """FastAPI says 400 where the body is no text at all; to a client that is bad input too."""
    return JSONResponse({"detail": "The body is not JSON in UTF-8."}, status_code=422)


async def _client_gone(request: Request, error: Exception) -> Response:
    log.info("the client hung up; its request was stopped")
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    request_id = request.scope["state"]["request_id"]
    return JSONResponse(
        {"detail": f"Something failed that should not; the log has it under {request_id}."},
        status_code=500,
        # It is answered outside of the middleware.
        headers={"X-Request-ID": request_id, **SECURITY_HEADERS},
    )


def __getattr__(name: str) -> Any:
    """Makes `app` when a server asks for it, so that importing this module reads no environment."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        sys.exit(error.detail)
    logs.configure(settings.log_format)
    app = create_app(settings)
    globals()["app"] = app
    return app
