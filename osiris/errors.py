"""Maps each of the sidecar's errors to an HTTP answer: a table, and the exception handlers."""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llm_sidecar.errors import (
    AdapterRejected,
    CommandFailed,
    DatabaseUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    NotFound,
    QueueFull,
    RequestKeyReused,
    SettingsError,
    SidecarError,
    Unavailable,
    VoiceUnavailable,
)
from osiris.openapi import documented_paths
from osiris.response_headers import stored_header

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST: Final = 499


class ErrorRow(NamedTuple):
    """How the server answers, counts and logs one kind of error.

    Attributes:
        status: of the HTTP answer.
        metric_label: the value of the label `error` of `sidecar_request_errors_total`, which
            `llm_sidecar.telemetry.calls.error_name` returns; also the field `error` in the log.
        log_level: of its log line. DEBUG for a caller's mistake, because the access log has the
            status.
    """

    status: int
    metric_label: str
    log_level: int


ERRORS: Final[dict[type[SidecarError], ErrorRow]] = {
    SettingsError: ErrorRow(500, "SettingsError", logging.ERROR),
    CommandFailed: ErrorRow(500, "CommandFailed", logging.ERROR),
    InvalidRequest: ErrorRow(422, "InvalidRequest", logging.DEBUG),
    RequestKeyReused: ErrorRow(422, "RequestKeyReused", logging.DEBUG),
    NotFound: ErrorRow(404, "NotFound", logging.DEBUG),
    AdapterRejected: ErrorRow(409, "AdapterRejected", logging.DEBUG),
    QueueFull: ErrorRow(429, "QueueFull", logging.DEBUG),
    Unavailable: ErrorRow(503, "Unavailable", logging.WARNING),
    ModelUnavailable: ErrorRow(503, "ModelUnavailable", logging.WARNING),
    VoiceUnavailable: ErrorRow(503, "VoiceUnavailable", logging.WARNING),
    DatabaseUnavailable: ErrorRow(503, "DatabaseUnavailable", logging.WARNING),
    DeadlineExceeded: ErrorRow(504, "DeadlineExceeded", logging.WARNING),
}


def row_of(kind: type[SidecarError]) -> ErrorRow:
    """The row of a class of errors: its own, or that of its nearest base class.

    Raises:
        LookupError: neither has a row.
    """
    for base in kind.__mro__:
        if base in ERRORS:
            return ERRORS[base]
    raise LookupError(f"{kind.__name__} has no row")


def install(app: FastAPI) -> None:
    """Adds the exception handlers."""
    app.add_exception_handler(SidecarError, _sidecar_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(400, _unreadable_body)
    app.add_exception_handler(405, _method_not_allowed)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)


def log_failure(error: SidecarError) -> None:
    """Logs the error of a request at its level in the table."""
    row = row_of(type(error))
    log.log(
        row.log_level,
        "the request failed: %s",
        error.detail,
        extra={"error": row.metric_label},
    )


def error_body(error: SidecarError) -> dict[str, str]:
    """The fields of an error: `detail`, and `transaction_id` if a proposal is stored."""
    body = {"detail": error.detail}
    if error.transaction_id is not None:
        body["transaction_id"] = str(error.transaction_id)
    return body


async def _sidecar_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SidecarError)
    log_failure(error)
    headers = stored_header(error.stored)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    status = row_of(type(error)).status
    return JSONResponse(error_body(error), status_code=status, headers=headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """One entry for every bad field, without its value, which may be a prompt."""
    assert isinstance(error, RequestValidationError)
    by_field: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in error.errors():
        shown = {"loc": list(entry["loc"]), "msg": entry["msg"], "type": entry["type"]}
        by_field.setdefault(tuple(entry["loc"]), shown)
    return JSONResponse({"detail": list(by_field.values())}, status_code=422)


async def _unreadable_body(request: Request, error: Exception) -> Response:
    """Answers 422 where FastAPI answers 400, because the body is not even text."""
    return JSONResponse({"detail": "The body is not JSON in UTF-8."}, status_code=422)


async def _method_not_allowed(request: Request, error: Exception) -> Response:
    """Names all methods of the path; Starlette names only those of one route."""
    assert isinstance(error, HTTPException)
    template = getattr(request.scope.get("route"), "path_format", "").rstrip("/")
    operations = request.app.openapi()["paths"]
    documented = operations.get(documented_paths(request.app).get(template), {})
    allowed = {method.upper() for method in documented}
    allowed |= set(filter(None, (error.headers or {}).get("Allow", "").split(", ")))
    if "GET" in allowed:
        allowed.add("HEAD")
    names = sorted(allowed)
    return JSONResponse(
        {"detail": f"This path takes {' and '.join(names)}."},
        status_code=405,
        headers={"Allow": ", ".join(names)},
    )


async def _client_disconnected(request: Request, error: Exception) -> Response:
    log.info("the client disconnected; its request was cancelled")
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
