"""Registration of a function as a route, in both spellings of its path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel

from osiris.checked_route import CheckedRoute
from osiris.response_headers import declared, declared_optional
from osiris.schemas.errors import BadInput, ErrorBody

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_DESCRIPTIONS: Final = {
    404: "It does not exist, there is none yet, or it is off; the detail says which",
    409: "The adapter cannot be loaded; the old one stays in use",
    422: "Bad input: `detail` is a sentence, or a list of the bad fields",
    429: "The queue is full; `Retry-After` says when to try again",
    503: "A model, the voice or the database is missing or loading; `Retry-After` says when to try "
    "again",
    504: "The request's deadline has passed; the detail names what took the time, and "
    "`Retry-After` says when to try again",
}
_BAD_INPUT: Final = 422


def endpoint(
    router: APIRouter,
    method: str,
    path: str,
    *errors: int,
    error_model: type[BaseModel] = ErrorBody,
    bad_input_model: type[BaseModel] = BadInput,
    headers: Iterable[str] = (),
    optional_headers: Iterable[str] = (),
    error_headers: Iterable[str] = (),
    content: Mapping[str, Any] | None = None,
    documented: bool = True,
    **options: Any,
) -> Callable[[Endpoint], Endpoint]:
    """Registers a function for `path` with and without its trailing slash, and documents it.

    A function for GET also answers HEAD, for which the server sends no body. A stream has to check
    the method, as in `osiris.routes.speech`.

    Args:
        errors: statuses that the function answers with.
        error_model: the body of an error.
        bad_input_model: the body of a 422.
        headers, optional_headers, error_headers: names of the headers of a 200, of those that some
            of its forms lack, and of an error.
        content: OpenAPI's description of a 200 that is not JSON, by media type.
        documented: whether the path is in the OpenAPI document.
        options: other options of the route, such as `response_description`.
    """
    responses: dict[int | str, dict[str, Any]] = {
        status: {
            "model": bad_input_model if status == _BAD_INPUT else error_model,
            "description": _DESCRIPTIONS[status],
            "headers": declared(*error_headers),
        }
        for status in errors
    }
    described = declared(*headers) | declared_optional(*optional_headers)
    responses[200] = {"headers": described} | ({"content": content} if content else {})
    options = {"route_class_override": CheckedRoute, **options, "responses": responses}
    # HEAD needs separate routes, because every method of a documented route is documented.
    methods = ("GET", "HEAD") if method == "GET" else (method,)
    # The longer path first: a parameter that matches slashes would also match the last one.
    spellings = (f"{path.rstrip('/')}/", path.rstrip("/"))

    def register(function: Endpoint) -> Endpoint:
        for verb, spelling in itertools.product(methods, spellings):
            router.add_api_route(
                spelling,
                function,
                methods=[verb],
                include_in_schema=documented and (verb, spelling) == (method, path),
                **options,
            )
        return function

    return register
