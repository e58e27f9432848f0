"""A load that costs little itself: keep-alive connections from a process of its own.

An HTTP library takes as long for a request as a server takes to answer it, and on two cores that
hides what is measured.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import cast
from urllib.parse import urlsplit

import uvloop


def request(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """One HTTP/1.1 request as it goes over the wire."""
    fields = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **(headers or {})}
    if body:
        fields["Content-Type"] = "application/json"
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def rate(url: str, message: bytes, *, connections: int, seconds: float) -> float:
    """Requests per second that a server answers with 200 to `connections` clients at once.

    Raises:
        RuntimeError: it answered with another status, or ended a connection.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_rate, url, message, connections, seconds).result()


def _rate(url: str, message: bytes, connections: int, seconds: float) -> float:
    return uvloop.run(_run(url, message, connections, seconds))


async def _run(url: str, message: bytes, connections: int, seconds: float) -> float:
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    clients = [_Client(message, ended) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda c=client: c, host, port)  # type: ignore[misc]
    began, before = time.perf_counter(), sum(client.answered for client in clients)
    try:
        await asyncio.wait_for(ended, seconds)
    except TimeoutError:
        answered = sum(client.answered for client in clients) - before
        return answered / (time.perf_counter() - began)
    raise RuntimeError("the server ended the load")


class _Client(asyncio.Protocol):
    """Sends the next request once the last one is answered."""

    def __init__(self, message: bytes, ended: asyncio.Future[None]) -> None:
        self.answered = 0
        self._message = message
        self._ended = ended
        self._taken = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._message)

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
            self._end(RuntimeError(head.decode(errors="replace").split("\r\n")[0]))
            return
        self._taken.clear()
        self.answered += 1
        self._transport.write(self._message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(RuntimeError("the server ended a connection"))

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
