"""ASGI middleware: request ids, security headers, answers to unexpected errors, and limits on the
size and time of a body."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping
from typing import Final

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_sidecar.logs import log_context
from osiris.paths import is_probe_or_metrics, route_path

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes a well-formed `X-Request-ID`, or makes one, and puts it into `scope["state"]`
    and into every log line of the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        fields = {"request_id": request_id}
        log_context.set(fields)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except BaseException:
            # The server logs the error after this, in the same task.
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: fields.clear())
            raise
        # Connections and timers that the request has started may outlive it and still hold the
        # fields.
        fields.clear()


SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# HTML pages send a policy of their own.
_CSP: Final = "default-src 'none'; frame-ancestors 'none'"
_RAW_HEADERS: Final = tuple(
    (name.lower().encode(), value.encode())
    for name, value in (*SECURITY_HEADERS.items(), ("Content-Security-Policy", _CSP))
)


class SecurityHeaders:
    """Tells browsers not to cache, guess content types or embed; does not replace existing
    headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                # ASGI's names are in lower case. Starlette's `Headers` would search the list each
                # time.
                headers = dict(message["headers"])
                message["headers"] = [
                    *message["headers"],
                    *(header for header in _RAW_HEADERS if header[0] not in headers),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class UnexpectedErrors:
    """Answers 500 to an error that nothing else has answered, and raises it again.

    Starlette's own answer would be outside of all middleware, and lack their headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if scope["type"] == "http" and not begun:
                request_id = scope["state"]["request_id"]
                detail = f"An unexpected error occurred; the log has it under {request_id}."
                await JSONResponse({"detail": detail}, status_code=500)(scope, receive, send)
            raise


class BodyLimit:
    """Answers 413 to a body that is too large, and 408 to one that does not arrive in time.

    A declared length is checked before the body is read.

    Args:
        max_bytes: maximum size of a body.
        larger: larger maximum sizes, by path.
        seconds: how long the body may take to arrive.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int], seconds: float
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] in ("GET", "HEAD") and is_probe_or_metrics(scope):
            # These routes read no body.
            await self._app(scope, receive, send)
            return
        max_bytes = max(self._max_bytes, self._larger.get(route_path(scope).rstrip("/"), 0))
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            refusal = JSONResponse(
                {"detail": _too_large(max_bytes)},
                status_code=413,
                headers={"Connection": "close"},
            )
            await refusal(scope, receive, send)
            return
        body = _Body(receive, max_bytes, self._seconds)
        await self._app(scope, body.receive, body.noting(send))


class _Body:
    """The body of one request, within its limits."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._taken = 0
        self._whole = False
        self._answered = False

    def noting(self, send: Send) -> Send:
        """`send`, recording that the answer has begun."""

        async def send_and_note(message: Message) -> None:
            self._answered = True
            await send(message)

        return send_and_note

    async def receive(self) -> Message:
        """The next message.

        Raises:
            HTTPException: 413 or 408.
        """
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            if self._answered:
                # The rest of the body is not needed: treat the client as disconnected.
                return {"type": "http.disconnect"}
            raise HTTPException(
                408,
                f"The request's body did not arrive within {self._seconds:g} s.",
                headers={"Connection": "close"},
            ) from None
        self._whole = not message.get("more_body", False)
        self._taken += len(message.get("body", b""))
        if self._taken > self._max_bytes:
            detail = _too_large(self._max_bytes)
            raise HTTPException(413, detail, headers={"Connection": "close"})
        return message


def _too_large(max_bytes: int) -> str:
    return f"The request's body is larger than {max_bytes} bytes; send less."
