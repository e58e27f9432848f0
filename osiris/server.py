"""The HTTP face: `uvicorn osiris.server:app`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from llm_sidecar.errors import SettingsError, SidecarError
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from llm_sidecar.telemetry import instruments
from osiris.http import ClientGone
from osiris.metrics import install_metrics
from osiris.middleware import BodyLimit, RequestId
from osiris.routes import feedback, generation, operations, profiling, scoring, speech
from osiris.shutdown import bound_shutdown

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST: Final = 499


def create_app(settings: Settings) -> FastAPI:
    """The application; its parts start and stop with its lifespan."""
    telemetry = instruments.build(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        telemetry.start()
        sidecar = Sidecar(settings, metrics, telemetry)
        metrics.watch(sidecar.health)
        app.state.sidecar = sidecar
        bound_shutdown(settings.shutdown_grace)
        try:
            await sidecar.start()
            yield
        finally:
            await sidecar.close()
            await telemetry.close()

    app = FastAPI(
        title="Osiris LLM sidecar",
        version=_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own would export the texts of errors, if its variable asked it to.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    for routes in (generation, scoring, feedback, speech, operations, profiling):
        app.include_router(routes.router)
    app.add_exception_handler(SidecarError, _sidecar_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(400, _unreadable_body)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        larger={"/speak": speech.SPEAK_BODY_BYTES},
    )
    telemetry.install(app)
    app.add_middleware(RequestId)
    metrics = install_metrics(app, settings)
    return app


def _version() -> str:
    try:
        return version("osiris-llm-sidecar")
    except PackageNotFoundError:
        # A checkout that is run without being installed.
        return "0.0.0"


async def _sidecar_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SidecarError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": error.detail}, status_code=error.status, headers=headers)


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
        headers={"X-Request-ID": request_id},
    )


def __getattr__(name: str) -> Any:
    """Makes `app` when a server asks for it, so that importing this module reads no environment."""
    if name != "app":
        raise AttributeError(name)
    _log_to_stderr()
    try:
        app = create_app(Settings.from_environ())
    except SettingsError as error:
        sys.exit(error.detail)
    globals()["app"] = app
    return app


def _log_to_stderr() -> None:
    """Gives this project's loggers a handler, unless whoever runs the server has done so."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("llm_sidecar", "osiris"):
        logging.getLogger(name).setLevel(logging.INFO)
