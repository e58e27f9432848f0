"""A cheap load generator: keep-alive connections from a separate process.

An HTTP library spends as much time on a request as the server does, which on two cores distorts the
measurement.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Final, cast
from urllib.parse import urlsplit

import uvloop

NUMBER: Final = "#" * 9
"""In a message, this becomes the number of the request, counted from 0."""


def request(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """One HTTP/1.1 request as it goes over the wire."""
    fields = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **(headers or {})}
    if body:
        fields["Content-Type"] = "application/json"
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def rate(url: str, message: bytes, *, connections: int, requests: int) -> float:
    """Requests per second that a server answers with 200 to `connections` clients at once.

    Raises:
        RuntimeError: it answered with another status, or ended a connection.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_rate, url, message, connections, requests).result()


def _rate(url: str, message: bytes, connections: int, requests: int) -> float:
    return uvloop.run(_run(url, message, connections, requests))


async def _run(url: str, message: bytes, connections: int, requests: int) -> float:
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    loop = asyncio.get_running_loop()
    work = _Work(message, requests, loop.create_future())
    began = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: _Client(work), host, port)
    await work.over
    return requests / (time.perf_counter() - began)


class _Work:
    """The requests that all clients share."""

    def __init__(self, message: bytes, requests: int, over: asyncio.Future[None]) -> None:
        self.over = over
        self._parts = message.split(NUMBER.encode())
        self._requests = self._unanswered = requests
        self._sent = 0

    def take(self) -> bytes | None:
        """The next request to send, or None."""
        if self._sent == self._requests:
            return None
        number = b"%09d" % self._sent
        self._sent += 1
        return number.join(self._parts)

    def answered(self) -> None:
        self._unanswered -= 1
        if self._unanswered == 0 and not self.over.done():
            self.over.set_result(None)

    def fail(self, why: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(why))


class _Client(asyncio.Protocol):
    """Sends the next request once the last one is answered."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._taken = bytearray()
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._taken += data
        head, blank, body = self._taken.partition(b"\r\n\r\n")
        if not blank:
            return
        length = next(
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._work.fail(head.decode(errors="replace").split("\r\n")[0])
            return
        self._taken.clear()
        self._work.answered()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        # The server ends a connection that has been idle for long.
        if self._waiting:
            self._work.fail("the server ended a connection")

    def _send(self) -> None:
        message = self._work.take()
        self._waiting = message is not None
        if message is not None:
            self._transport.write(message)
