"""A FastAPI route with checks that FastAPI lacks: the encoding of the body, and parameters that are
sent twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from http import HTTPStatus
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

_CONTENT_TYPE: Final = (
    "Content-Type: send the body as JSON, with the header Content-Type: application/json."
)
_LONGEST_CONTENT_TYPE: Final = 256
"""Characters. The parser that FastAPI uses takes a second for a header of 30,000."""
_CHARSET: Final = "Content-Type: JSON is UTF-8; send charset=utf-8, or leave the charset out."
_CONTENT_ENCODING: Final = (
    "Content-Encoding: the server does not decompress; send the body as it is, without this header."
)


class CheckedRoute(APIRoute):
    """Refuses a body that is not a JSON object, and a parameter that is sent twice, in the query or
    as a header.

    An empty body counts as no body, whatever the headers say.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps FastAPI's handler in the checks."""
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            self._check_repeated(request)
            if self.body_field is not None:
                await _check_body(request)
            return await handle(request)

        return check_and_handle

    def _check_repeated(self, request: Request) -> None:
        """Raises RequestValidationError for a parameter that is sent twice: FastAPI would take one
        of them and drop the others."""
        sent = [
            ("query", parameter.alias, request.query_params.getlist(parameter.alias))
            for parameter in self.dependant.query_params
        ] + [
            ("header", parameter.alias, request.headers.getlist(parameter.alias))
            for parameter in self.dependant.header_params
        ]
        repeated = [
            {
                "type": "repeated_parameter",
                "loc": (where, name),
                "msg": "Parameter should be sent once",
            }
            for where, name, values in sent
            if len(values) > 1
        ]
        if repeated:
            raise RequestValidationError(repeated)


async def _check_body(request: Request) -> None:
    """Reads the body, which the request keeps.

    Raises:
        HTTPException: 415 for a body that its headers do not declare as JSON in UTF-8.
        HTTPException: 400 for a body in another encoding.
        RequestValidationError: the body is not an object, or cannot be read as one.
        ClientDisconnect: the client disconnected before the body was complete.
    """
    body = await request.body()
    if not body:
        return
    if detail := _header_fault(request.headers):
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail)
    if b"\0" in body:
        # Python would take the body for UTF-16 or UTF-32, and decode it.
        raise HTTPException(HTTPStatus.BAD_REQUEST)
    try:
        value = await request.json()
    except RecursionError:
        raise _bad_body("too_deep", "Input should have fewer levels") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        # FastAPI parses it again, and reports where it is not valid JSON.
        return
    except ValueError:
        # Python refuses an integer with too many digits.
        raise _bad_body("too_many_digits", "Input should have shorter numbers") from None
    if not isinstance(value, dict):
        # FastAPI would treat null as no body if the body is optional.
        raise _bad_body("dict_type", "Input should be an object")


def _bad_body(kind: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": message}])


def _header_fault(headers: Headers) -> str | None:
    """The error of the headers that describe a body, or None.

    A missing Content-Type is also refused: a page of another origin can send such a body without a
    CORS preflight.
    """
    encodings = ",".join(headers.getlist("content-encoding")).lower().split(",")
    if {encoding.strip() for encoding in encodings} - {"", "identity"}:
        return _CONTENT_ENCODING
    declared = headers.getlist("content-type")
    if len(declared) != 1 or len(declared[0]) > _LONGEST_CONTENT_TYPE:
        return _CONTENT_TYPE
    message = Message()
    message["content-type"] = declared[0]
    # The same rule as FastAPI's, which would otherwise treat the body as bytes.
    subtype = message.get_content_subtype()
    is_json = subtype == "json" or subtype.endswith("+json")
    if message.get_content_maintype() != "application" or not is_json:
        return _CONTENT_TYPE
    charset = message.get_param("charset", "utf-8")
    if not isinstance(charset, str) or charset.lower() not in ("utf-8", "utf8"):
        return _CHARSET
    return None
