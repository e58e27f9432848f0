"""The header `Idempotency-Key`: a request that is sent again gets the first answer again."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import Header, Request, Response
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from llm_sidecar.db.transaction import RequestKey
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.services.idempotency import Attempt, Idempotency
from osiris.disconnects import cancel_on_disconnect
from osiris.middleware.access import caller
from osiris.paths import route_path

log = logging.getLogger(__name__)

REPLAYED: Final = "Idempotent-Replayed"
_PATTERN: Final = "[!-~]{1,255}"


def _check(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(_PATTERN, value):
        raise PydanticCustomError(
            "idempotency_key", "Input should be 1 to 255 visible ASCII characters"
        )
    return value


IdempotencyKey = Annotated[
    str | None,
    BeforeValidator(_check),
    Header(
        alias="Idempotency-Key",
        description="identifies this request for 24 hours: if you send it again with the same key "
        "and body, you get the first answer again",
        # No example: a tool would send the same key with every request.
        json_schema_extra={"pattern": f"^{_PATTERN}$"},
    ),
]
"""The header, for a route's parameter; None without it."""


async def answered_once(
    request: Request,
    key: str | None,
    idempotency: Idempotency,
    answer: Callable[[Attempt], Awaitable[Response]],
    *,
    refuse_unkept: bool = False,
) -> Response:
    """The response of `answer`, or the one that the same request got before.

    Args:
        request: its body has been read.
        key: its `Idempotency-Key`.
        idempotency: keeps the responses.
        answer: makes a 2xx response, or raises.
        refuse_unkept: whether the request fails if the journal does not take its key; otherwise it
            is answered, and a retry is executed again.

    Raises:
        RequestKeyReused: the key was sent with another request.
        DeadlineExceeded: the same request still runs.
        DatabaseUnavailable: the journal does not take the key.
    """
    begun = await _begin(request, key, idempotency, refuse_unkept=refuse_unkept)
    if isinstance(begun, Response):
        return begun
    try:
        response = await answer(begun)
        await keep(idempotency, begun, response)
    finally:
        idempotency.end(begun)
    return response


async def begin_once(
    request: Request, key: str | None, idempotency: Idempotency
) -> Attempt | Response:
    """A new attempt for a stream, or the kept response to the same request.

    Pass an attempt to `keep` once it has succeeded, and in any case to `Idempotency.end`.

    Args:
        request, key, idempotency: see `answered_once`; a key that the journal cannot store is
            ignored.

    Raises:
        ClientDisconnect: the client has disconnected while it waited for an earlier attempt.
        RequestKeyReused, DeadlineExceeded: see `answered_once`.
    """
    beginning = asyncio.ensure_future(_begin(request, key, idempotency))
    try:
        return await cancel_on_disconnect(request, beginning)
    except BaseException:
        # The attempt may have begun in the same moment, or may begin despite its cancellation.
        beginning.add_done_callback(functools.partial(_end, idempotency))
        raise


async def keep(idempotency: Idempotency, attempt: Attempt, response: Response) -> None:
    """Keeps the response of an attempt with a key; its body must be text."""
    if attempt.request is not None:
        await idempotency.keep(attempt, _packed(response))


async def _begin(
    request: Request, key: str | None, idempotency: Idempotency, *, refuse_unkept: bool = False
) -> Attempt | Response:
    if key is None:
        return idempotency.without_key()
    try:
        begun = await idempotency.begin(_request_key(request, key), await _fingerprint(request))
    except DatabaseUnavailable as error:
        if refuse_unkept:
            raise
        log.error("a request is answered without its Idempotency-Key: %s", error.detail)
        return idempotency.without_key()
    return _unpacked(begun) if isinstance(begun, bytes) else begun


def _end(idempotency: Idempotency, beginning: asyncio.Future[Attempt | Response]) -> None:
    if beginning.cancelled() or beginning.exception() is not None:
        return
    if isinstance(begun := beginning.result(), Attempt):
        idempotency.end(begun)


def _request_key(request: Request, key: str) -> RequestKey:
    known = caller(request.scope)
    return RequestKey("" if known is None else known.label, key)


async def _fingerprint(request: Request) -> str:
    """A hash of the method, the path without a trailing slash, the sorted query, and the body."""
    query = sorted(urllib.parse.parse_qsl(request.url.query, keep_blank_values=True))
    head = [request.method, route_path(request.scope).rstrip("/"), query]
    return hashlib.sha256(json.dumps(head).encode() + b"\n" + await request.body()).hexdigest()


def _packed(response: Response) -> bytes:
    """Encodes a response for the journal."""
    headers = [
        [name.decode("latin-1"), value.decode("latin-1")] for name, value in response.raw_headers
    ]
    kept: dict[str, Any] = {
        "status": response.status_code,
        "headers": headers,
        "body": bytes(response.body).decode(),
    }
    return json.dumps(kept, ensure_ascii=False).encode()


def _unpacked(kept: bytes) -> Response:
    packed = json.loads(kept)
    response = Response(packed["body"], packed["status"])
    response.raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in packed["headers"]
    ]
    response.headers[REPLAYED] = "true"
    return response
