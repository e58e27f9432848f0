"""Limits on the size of a body, and on the time that it takes to arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_sidecar.telemetry.asgi import TrackedSend
from osiris.paths import is_probe_or_metrics, route_path
from osiris.refusals import refusal


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
            headers = {"Connection": "close"}
            await refusal(scope, 413, _too_large(max_bytes), headers)(scope, receive, send)
            return
        response = TrackedSend(send)
        body = _Body(receive, response, max_bytes, self._seconds)
        await self._app(scope, body.receive, response)


class _Body:
    """The body of one request, within its limits."""

    def __init__(
        self, receive: Receive, response: TrackedSend, max_bytes: int, seconds: float
    ) -> None:
        self._receive = receive
        self._response = response
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._received = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            HTTPException: 413 or 408.
        """
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            if self._response.started:
                # The rest of the body is not needed: treat the client as disconnected.
                return {"type": "http.disconnect"}
            raise HTTPException(
                408,
                f"The request's body did not arrive within {self._seconds:g} s.",
                headers={"Connection": "close"},
            ) from None
        self._complete = not message.get("more_body", False)
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            detail = _too_large(self._max_bytes)
            raise HTTPException(413, detail, headers={"Connection": "close"})
        return message


def _too_large(max_bytes: int) -> str:
    return f"The request's body is larger than {max_bytes} bytes; send less."
