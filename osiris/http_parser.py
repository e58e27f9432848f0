"""Parsing of HTTP requests: h11 with further limits, and the answers to what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES

from osiris.paths import is_openai
from osiris.refusals import error_body

MAX_HEAD_BYTES: Final = 1 << 16
"""Bytes of request line and headers; also of a chunk's size line, and of trailers."""
_FREE_CHUNKS: Final = 4096
_LEAST_CHUNK: Final = 64
"""Bytes per chunk that a body must have on average beyond its first `_FREE_CHUNKS` chunks. Each
chunk costs 30 us: a megabyte in chunks of one byte would block other requests for half a minute."""
CLOSE: Final = (b"connection", b"close")
_ABSOLUTE: Final = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)
_DETAILS: Final = {
    400: "This is not a valid HTTP/1.1 request.",
    408: "The request's headers did not arrive in time.",
    413: "The request's body comes in too many tiny chunks; send larger ones, or Content-Length.",
    431: "The request line and the headers exceed {limit} bytes in total; send less.",
    501: "The request's Transfer-Encoding is not supported; use chunked or Content-Length.",
}


class Parser(h11.Connection):
    """h11's parser with three more checks.

    The size limit of the headers also holds if they arrive at once. A body in very many tiny chunks
    is refused. So is a body whose length is given twice: proxies disagree where such a request
    ends.

    Attributes:
        refusal: why the latest request is refused.
    """

    def __init__(self, max_head: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=max_head)
        self._max_head = max_head
        self.refusal: h11.RemoteProtocolError | None = None
        self._chunks = 0
        self._chunk_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event.

        Raises:
            h11.RemoteProtocolError: the request is not valid HTTP, or too long.
        """
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._chunks = self._chunk_bytes = 0
                return self._checked(event)
            if isinstance(event, h11.Data):
                self._count(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _count(self, data: h11.Data) -> None:
        self._chunks += data.chunk_end
        self._chunk_bytes += len(data.data)
        if self._chunks > _FREE_CHUNKS + self._chunk_bytes // _LEAST_CHUNK:
            raise h11.RemoteProtocolError("tiny chunks", error_status_hint=413)

    def _checked(self, request: h11.Request) -> h11.Request:
        size = len(request.method) + len(request.target) + 12
        is_chunked = has_length = False
        for name, value in request.headers:
            size += len(name) + len(value) + 4
            is_chunked = is_chunked or name == b"transfer-encoding"
            has_length = has_length or name == b"content-length"
        if size > self._max_head:
            raise h11.RemoteProtocolError("head too long", error_status_hint=431)
        if is_chunked and (has_length or request.http_version < b"1.1"):
            raise h11.RemoteProtocolError("two lengths")
        if not request.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("unsupported HTTP version")
        if prefix := _ABSOLUTE.match(request.target):
            target = request.target[prefix.end() :]
            return h11.Request(
                method=request.method,
                target=target if target.startswith(b"/") else b"/" + target,
                headers=request.headers,
                http_version=request.http_version,
            )
        return request

    def refusal_events(
        self, status: int, default_headers: Iterable[tuple[bytes, bytes]], scope: Scope | None
    ) -> tuple[h11.Event, ...]:
        """The response to a request that cannot be parsed.

        Args:
            status: of the response.
            default_headers: the headers of every response.
            scope: of the request; None if its request line or headers cannot be parsed.
        """
        detail = _DETAILS.get(status, _DETAILS[400]).format(limit=self._max_head)
        openai = scope is not None and is_openai(scope)
        body = json.dumps(error_body(detail, status) if openai else {"detail": detail}).encode()
        headers = [
            *default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            CLOSE,
        ]
        return (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
