"""ASGI apps without a server: requests to a middleware, and an app behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Inner:
    """The app behind a middleware: answers 200 with `inner`.

    Attributes:
        scopes, receivers: of the requests that reached it.
    """

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.receivers: list[Receive] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.receivers.append(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})


def client(app: ASGIApp, root_path: str = "") -> httpx.AsyncClient:
    """A client whose requests go to the app directly."""
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


class Call:
    """One call of an app, message by message.

    Attributes:
        received: messages still to be received.
        sent: what the app has sent.
    """

    def __init__(self, *received: Message) -> None:
        self.received = list(received)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.received.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def headers(self) -> dict[str, str]:
        raw: Sequence[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return {name.decode().lower(): value.decode() for name, value in raw}


def http_scope(path: str, **changes: Any) -> dict[str, Any]:
    """The scope of a POST request."""
    scope: Mapping[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    return {**scope, **changes}


class Reader:
    """A client of one stream, without a server.

    Attributes:
        sent: the messages that it has received.
        disconnected: set it to disconnect.
        reads: clear it to stop reading.
    """

    def __init__(self, body: bytes = b"") -> None:
        self.sent: list[Message] = []
        self.disconnected = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._requests: list[Message] = [{"type": "http.request", "body": body}]

    async def receive(self) -> Message:
        """The request, then its disconnect."""
        if self._requests:
            return self._requests.pop()
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Receives a message once it reads; drops it after a disconnect, as uvicorn does."""
        await self.reads.wait()
        if not self.disconnected.is_set():
            self.sent.append(message)

    @property
    def body(self) -> bytes:
        """The received part of the response's body."""
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def has_all(self) -> bool:
        """Whether the response is complete."""
        last = self.sent[-1] if self.sent else {}
        return last.get("type") == "http.response.body" and not last.get("more_body")


def events_in(body: bytes) -> list[tuple[str, Any]]:
    """The name and the data of each server-sent event, without comments."""
    found = []
    for block in body.decode().split("\r\n\r\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\r\n") if line)
        if "data" in fields:
            found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found
