"""Error objects of the OpenAI API, for responses and for streams that fail in the middle.

raise bad_field("tools[0].type", "Only functions are supported.", "unsupported_value")
return await event_stream(request, events(), functools.partial(error_event, request))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sse_starlette import ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.types import ExceptionHandler, Scope

from llm_sidecar.errors import InvalidRequest, NotFound, SidecarError
from osiris.errors import row_of
from osiris.middleware.unexpected_errors import unexpected_detail
from osiris.paths import is_openai, route_path
from osiris.refusals import error_body

_HANDLED: Final = (SidecarError, RequestValidationError, HTTPException, 400, 405)
"""The errors that `osiris.errors` and FastAPI have handlers for."""
_FIELDS: Final = {
    "/v1/audio/speech": {"text": "input"},
    "/v1/chat/completions": {
        "max_length": "max_tokens",
        "prompt": "messages",
        "schema": "response_format",
    },
    "/v1/completions": {"max_length": "max_tokens"},
    "/v1/responses": {
        "logprobs": "include",
        "max_length": "max_output_tokens",
        "prompt": "input",
        "schema": "text.format",
    },
}
"""The fields of a path that have another name in `InvalidRequest.field`."""
_CODES: Final = {
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "unsupported_value": "unsupported_value",
    "json_invalid": "invalid_json",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
}
"""OpenAI's code for each type of validation error. Types such as `int_type` become `invalid_type`,
all others `invalid_value`."""


def install(app: FastAPI) -> None:
    """Converts the errors of all paths under `/v1` to error objects; call `osiris.errors.install`
    first."""
    for kind in _HANDLED:
        handle = app.exception_handlers[kind]
        app.add_exception_handler(kind, _converting(cast(Any, handle)))


def bad_field(param: str, message: str, code: str = "invalid_value") -> RequestValidationError:
    """The error of a field that the schema of the request cannot check.

    Args:
        param: the path of the field, such as `tools[0].type`.
        message: one sentence.
        code: `invalid_value`, or a key of `_CODES`.
    """
    return RequestValidationError([{"type": code, "loc": ("body", param), "msg": message}])


def error_event(request: Request, error: Exception) -> ServerSentEvent:
    """The last event of a stream that fails after its response has started."""
    body = object_of(error, request.scope)
    return ServerSentEvent(data=json.dumps(body, ensure_ascii=False))


def object_of(error: Exception, scope: Scope) -> dict[str, Any]:
    """The body of an error: `{"error": {"message", "type", "param", "code"}}`.

    Args:
        error: an unexpected one is not described.
        scope: of the request; its path decides the names of fields.
    """
    if isinstance(error, SidecarError):
        return _sidecar_error(error, route_path(scope).rstrip("/"))
    if isinstance(error, RequestValidationError):
        return _validation_error(error.errors())
    if isinstance(error, HTTPException):
        return error_body(str(error.detail), error.status_code)
    return error_body(unexpected_detail(scope), 500)


def _converting(handle: ExceptionHandler) -> ExceptionHandler:
    """Wraps a handler: its responses to paths under `/v1` get an error object."""

    async def converted(request: Request, error: Exception) -> Response:
        response: Response = await handle(request, error)  # type: ignore[arg-type, misc]
        if not is_openai(request.scope) or not response.body:
            return response
        body = object_of(error, request.scope)
        if isinstance(error, HTTPException):
            # The handlers of 400 and 405 have better messages than the error.
            body["error"]["message"] = json.loads(bytes(response.body))["detail"]
        # The OpenAI API does not use 422.
        status = 400 if response.status_code == 422 else response.status_code
        kept = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "content-type")
        }
        return JSONResponse(body, status, headers=kept)

    return cast(ExceptionHandler, converted)


def _sidecar_error(error: SidecarError, path: str) -> dict[str, Any]:
    message = error.detail
    param = code = None
    if isinstance(error, NotFound):
        code = "model_not_found"
        param = "model"
    elif isinstance(error, InvalidRequest):
        code = "context_length_exceeded" if error.exceeds_context else "invalid_value"
        if error.field is not None:
            param = _FIELDS.get(path, {}).get(error.field, error.field)
            message = f"{param}: {error.problem}"
    return error_body(message, row_of(type(error)).status, param=param, code=code)


def _validation_error(errors: Sequence[Any]) -> dict[str, Any]:
    """The first bad field: an error object names only one."""
    first = errors[0]
    kind = first["type"]
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    param = _param(first["loc"][1:]) if kind != "json_invalid" else ""
    message = first["msg"] if not param else f"{param}: {first['msg']}"
    return error_body(message, 400, param=param or None, code=code)


def _param(location: Sequence[str | int]) -> str:
    """A path of keys and indexes as OpenAI writes it: `messages[0].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")
