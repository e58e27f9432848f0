"""Identifies a request: its id in the response and in log lines, and its trace in events."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_sidecar.logs import log_context
from llm_sidecar.telemetry.trace_context import is_traceparent, traceparent

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def is_request_id(text: str) -> bool:
    """Whether it may be echoed, and written to the log."""
    return _REQUEST_ID.fullmatch(text) is not None


class RequestId:
    """Echoes a well-formed `X-Request-ID`, or makes an id.

    The id is in `scope["state"]["request_id"]` and in every log line of the request. The client's
    `traceparent` is in every event of the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        request_id = sent if is_request_id(sent) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        fields = {"request_id": request_id}
        log_context.set(fields)
        trace = headers.get("traceparent", "")
        traceparent.set(trace if is_traceparent(trace) else None)

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
