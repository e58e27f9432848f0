"""What every route needs: both spellings of a path, the sidecar, and client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from llm_sidecar import input_model
from llm_sidecar.input_model import InputModel
from llm_sidecar.models.base import Completion, Delta
from llm_sidecar.sidecar import Sidecar
from osiris.checked_route import CheckedRoute, ClientGone
from osiris.response_headers import declared
from osiris.schemas import BadInput, ErrorBody

T = TypeVar("T")
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_DESCRIPTIONS = {
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


async def current_sidecar(request: Request) -> Sidecar:
    """The sidecar of the app that serves the request.

    A coroutine, because FastAPI calls other functions in a thread, which takes longer than a probe.
    """
    sidecar: Sidecar = request.app.state.sidecar
    return sidecar


CurrentSidecar = Annotated[Sidecar, Depends(current_sidecar)]


def endpoint(
    router: APIRouter,
    method: str,
    path: str,
    *errors: int,
    error_model: type[BaseModel] = ErrorBody,
    bad_input_model: type[BaseModel] = BadInput,
    headers: Iterable[str] = (),
    error_headers: Iterable[str] = (),
    content: Mapping[str, Any] | None = None,
    documented: bool = True,
    **options: Any,
) -> Callable[[Endpoint], Endpoint]:
    """Registers a function for `path` with and without its trailing slash, and documents it.

    A function for GET also answers HEAD, for which the server sends no body. A stream has to check
    the method; see `osiris.routes.speech`.

    Args:
        errors: statuses that the function answers with.
        error_model: the body of an error.
        bad_input_model: the body of a 422.
        headers, error_headers: names of the headers that a good answer and an error carry.
        content: media types of a good answer that is not JSON, as OpenAPI describes them.
        documented: whether the path is in the document.
        options: of the route, such as `response_description`.
    """
    responses: dict[int | str, dict[str, Any]] = {
        status: {
            "model": bad_input_model if status == _BAD_INPUT else error_model,
            "description": _DESCRIPTIONS[status],
            "headers": declared(*error_headers),
        }
        for status in errors
    }
    responses[200] = {"headers": declared(*headers)} | ({"content": content} if content else {})
    options = {"route_class_override": CheckedRoute, **options, "responses": responses}

    def register(function: Endpoint) -> Endpoint:
        bare = path.rstrip("/")
        # The longer one first: a parameter that matches slashes would also match the last one.
        spellings = (f"{bare}/", bare)
        # HEAD has routes of its own, because every method of a documented route is documented.
        methods = ("GET", "HEAD") if method == "GET" else (method,)
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


def check_length(sidecar: Sidecar, body: InputModel) -> None:
    """Refuses a body in which a text, or an object as JSON, is longer than MAX_PROMPT_CHARS.

    Raises:
        RequestValidationError: names each field that is too long.
    """
    try:
        input_model.check_length(body, sidecar.settings.max_prompt_chars)
    except ValidationError as error:
        errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
        raise RequestValidationError(errors) from None


async def completed(stream: AsyncGenerator[Delta, None]) -> Completion:
    """The whole of a generation."""
    async with contextlib.aclosing(stream):
        return Completion.of([delta async for delta in stream])


async def result_of(items: AsyncGenerator[object, None], kind: type[T]) -> T:
    """The last item of a stream, which is of this kind."""
    last: object = None
    async with contextlib.aclosing(items):
        async for item in items:
            last = item
    assert isinstance(last, kind)
    return last


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGone: the client has disconnected.
    """
    working = asyncio.ensure_future(work)
    # The body is read already, so the only message still to come is the disconnect.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def generation_headers(completion: Completion) -> dict[str, str]:
    """The metadata of a generation, as response headers."""
    return {
        "X-Model": completion.model,
        "X-Finish-Reason": completion.finish_reason,
        "X-Prompt-Tokens": str(completion.prompt_tokens),
        "X-Completion-Tokens": str(completion.completion_tokens),
    }


def stored_header(stored: bool) -> dict[str, str]:
    """`X-Stored: false` if a row of the request could not be stored."""
    return {} if stored else {"X-Stored": "false"}
