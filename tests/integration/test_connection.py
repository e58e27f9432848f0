"""The limits of connections, over real sockets: sizes, times and numbers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from starlette.types import Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from llm_sidecar.settings import Settings
from osiris import connection
from osiris.connection import limit_connections
from osiris.http_parser import MAX_HEAD_BYTES

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /speak HTTP/1.1\r\nHost: x\r\n"
LARGE = 24 << 20
"""Bytes of an answer that exceed any kernel's buffers."""


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on uvloop, as the server does; its transports differ from asyncio's."""

    @functools.wraps(test)
    def run(*args: Any, **arguments: Any) -> None:
        uvloop.run(test(*args, **arguments))

    return run


class Served:
    """A server of one small app.

    Attributes:
        state: uvicorn's, with the open connections.
        draining: whether the server drains.
        held: connections that stay open until the end.
        release: ends the requests for `/wait`.
        cancelled: set when a client of `/wait` has disconnected.
    """

    def __init__(self) -> None:
        self.state = ServerState()
        self.draining = False
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.address: tuple[str, int] | str = ""
        self.held: list[asyncio.StreamWriter] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the path and the length of the body.

        `/large` answers with many bytes, `/refuse` ignores the body, `/wait` once it is released,
        and `/endless` with an endless stream.
        """
        body, status = b"", 200
        if scope["path"] == "/refuse":
            status = 401
        else:
            body = await read(receive)
        if scope["path"] == "/wait":
            self.started.set()
            await self._wait(receive)
        answer = json.dumps({"path": scope["path"], "body": len(body)}).encode()
        if scope["path"] == "/large":
            answer = bytes(LARGE)
        if scope["path"] == "/endless":
            await self._stream(receive, send)
            return
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _stream(self, receive: Receive, send: Send) -> None:
        disconnected = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not disconnected.done():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await asyncio.sleep(0)
        self.cancelled.set()

    async def _wait(self, receive: Receive) -> None:
        disconnected = asyncio.ensure_future(receive())
        released = asyncio.ensure_future(self.release.wait())
        await asyncio.wait({disconnected, released}, return_when=asyncio.FIRST_COMPLETED)
        if disconnected.done():
            self.cancelled.set()
        for task in (disconnected, released):
            task.cancel()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.address, str):
            return await asyncio.open_unix_connection(self.address)
        return await asyncio.open_connection(*self.address)

    async def until_none_is_open(self) -> None:
        async with asyncio.timeout(10):
            while self.state.connections:
                await asyncio.sleep(0.01)


async def read(receive: Receive) -> bytes:
    body = b""
    while True:
        message: Message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


@contextlib.asynccontextmanager
async def serve(address: str = "127.0.0.1", **settings: Any) -> AsyncIterator[Served]:
    """A server on an IP address, or on a Unix socket at a path."""
    served = Served()
    config = Config(served.app, log_config=None, ws="none", interface="asgi3")
    config.load()
    limit_connections(config, Settings(**settings), lambda: served.draining)
    loop = asyncio.get_running_loop()

    def make_connection() -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = config.http_protocol_class
        return make(config=config, server_state=served.state, app_state={}, _loop=loop)

    if address.startswith("/"):
        server = await loop.create_unix_server(make_connection, address)
        served.address = address
    else:
        server = await loop.create_server(make_connection, address, 0)
        served.address = server.sockets[0].getsockname()[:2]
    try:
        yield served
    finally:
        server.close()
        for writer in served.held:
            writer.transport.abort()
        for open_one in list(served.state.connections):
            open_one.transport.abort()
        await served.until_none_is_open()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body of the next answer but `100 Continue`."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, headers = parse(head)
        if status == 100:
            return await answer(reader)
        return status, headers, json.loads(await reader.readexactly(int(headers["content-length"])))


def parse(head: str) -> tuple[int, dict[str, str]]:
    first, *lines = head.rstrip().split("\r\n")
    fields = (line.partition(": ") for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, _, value in fields}


async def ask(served: Served, *pieces: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The answer to a request of one client."""
    reader, writer = await served.connect()
    try:
        for part in pieces:
            writer.write(part)
            await writer.drain()
        return await answer(reader)
    finally:
        writer.close()


async def is_closed(reader: asyncio.StreamReader) -> bytes:
    """All bytes until the server closes."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read()
        return b""


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "TLS": b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
}


@pytest.mark.parametrize("offer", OFFERS)
@on_uvloop
async def test_an_upgrade_header_does_not_lose_the_body_or_the_connection(offer: str) -> None:
    request = POST + OFFERS[offer] + b"Content-Length: 5\r\n\r\nhello"
    async with serve() as served:
        reader, writer = await served.connect()
        for _ in range(2):
            writer.write(request)
            status, headers, body = await answer(reader)
            assert (status, body) == (200, {"path": "/speak", "body": 5})
            assert "upgrade" not in headers
        writer.close()


def head_of(size: int) -> bytes:
    """A request's head of this many bytes, as the server counts them."""
    fixed = len(b"GET / HTTP/1.1\r\nHost: x\r\nX: \r\n\r\n") - len("\r\n\r\n") + len("\r\n")
    return b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (size - fixed) + b"\r\n\r\n"


TOO_LONG = {"detail": "The request line and the headers exceed 65536 bytes in total; send less."}


@on_uvloop
async def test_headers_of_64_kib_are_served_and_longer_ones_refused() -> None:
    async with serve() as served:
        assert (await ask(served, head_of(MAX_HEAD_BYTES)))[0] == 200
        status, headers, body = await ask(served, head_of(MAX_HEAD_BYTES + 1))
        assert (status, headers["connection"], body) == (431, "close", TOO_LONG)


@pytest.mark.parametrize(
    "endless",
    [
        [GET, *(b"X-%d: " % number + b"a" * 60_000 + b"\r\n" for number in range(20))],
        [GET, b"X: " + b"a" * 200_000],
        [b"GET /" + b"a" * 200_000],
        [*(b"GET / HTTP/1.1\r\nHost: x\r\n" for _ in range(1)), b"a:b\r\n" * 20_000, b"\r\n"],
    ],
    ids=["many fields", "one field", "a path", "many small fields"],
)
@on_uvloop
async def test_endless_headers_are_refused(endless: list[bytes]) -> None:
    async with serve() as served:
        status, headers, body = await ask(served, *endless)
        assert (status, headers["connection"], body) == (431, "close", TOO_LONG)


@on_uvloop
async def test_a_client_that_is_still_sending_gets_its_refusal() -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(GET + b"X: " + b"a" * 70_000)
        assert (await answer(reader))[0] == 431
        for _ in range(10):
            # A closed socket would answer with a reset.
            writer.write(b"a" * 50_000)
            await writer.drain()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    "rest",
    [b"1;" + b"e" * 200_000, b"1\r\na\r\n0\r\nX: " + b"t" * 200_000],
    ids=["a chunk's extension", "trailers"],
)
@on_uvloop
async def test_chunk_sizes_and_trailers_are_limited(rest: bytes) -> None:
    async with serve() as served:
        status, headers, _ = await ask(served, POST + b"Transfer-Encoding: chunked\r\n\r\n", rest)
        assert status == 431
        assert headers["connection"] == "close"
        await served.until_none_is_open()


@on_uvloop
async def test_a_body_in_very_many_tiny_chunks_is_refused() -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    tiny, large = b"1\r\na\r\n", b"400\r\n" + b"a" * 1024 + b"\r\n"
    async with serve() as served:
        _, _, body = await ask(served, chunked, tiny * 4096 + b"0\r\n\r\n")
        assert body["body"] == 4096
        _, _, body = await ask(served, chunked, (tiny + large) * 8000 + b"0\r\n\r\n")
        assert body["body"] == 8000 * 1025
        status, headers, _ = await ask(served, chunked, tiny * 4200)
        assert (status, headers["connection"]) == (413, "close")
        status, _, body = await ask(served, chunked.replace(b"/speak", b"/v1/a"), tiny * 4200)
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")
        await served.until_none_is_open()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nab", 400),
        (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (GET.replace(b"1.1", b"2.0") + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
    ],
    ids=["both lengths", "two lengths", "old and chunked", "a coding", "a version", "no host"],
)
@on_uvloop
async def test_an_ambiguous_request_is_refused(request_: bytes, status: int) -> None:
    async with serve() as served:
        found, headers, body = await ask(served, request_)
        assert (found, headers["connection"], list(body)) == (status, "close", ["detail"])


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://example.com/health/live?a=b", "/health/live"),
        (b"HTTP://example.com", "/"),
        (b"/http://example.com/a", "/http://example.com/a"),
    ],
)
@on_uvloop
async def test_a_target_may_be_absolute(target: bytes, path: str) -> None:
    async with serve() as served:
        _, _, body = await ask(served, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert body["path"] == path


@on_uvloop
async def test_a_client_of_http_1_0_is_served() -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(b"GET /a HTTP/1.0\r\n\r\n")
        assert (await answer(reader))[2] == {"path": "/a", "body": 0}
        assert await is_closed(reader) == b""
        writer.close()


@on_uvloop
async def test_a_client_that_waits_for_100_continue_gets_it() -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"ab")
        assert (await answer(reader))[2]["body"] == 2
        writer.close()


@on_uvloop
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(500)))
        assert [(await answer(reader))[2]["path"] for _ in range(500)] == [
            f"/{number}" for number in range(500)
        ]
        writer.close()


@on_uvloop
async def test_a_silent_connection_is_closed() -> None:
    async with serve(limits={"header_timeout": 0.2}) as served:
        reader = await held(served, b"")
        assert await is_closed(reader) == b""
        await served.until_none_is_open()


@pytest.mark.parametrize("earlier", [b"", GET + b"\r\n"], ids=["at first", "after an answer"])
@on_uvloop
async def test_incomplete_headers_get_408_however_they_arrive(earlier: bytes) -> None:
    async with serve(limits={"header_timeout": 0.3}) as served:
        reader, writer = await served.connect()
        if earlier:
            writer.write(earlier)
            assert (await answer(reader))[0] == 200

        async def drip() -> None:
            writer.write(GET)
            while True:
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        status, headers, body = await answer(reader)
        dripping.cancel()
        assert (status, headers["connection"]) == (408, "close")
        assert body == {"detail": "The request's headers did not arrive in time."}
        writer.close()
        await served.until_none_is_open()


@on_uvloop
async def test_the_server_does_not_wait_for_the_rest_of_an_unneeded_body() -> None:
    async with serve(limits={"header_timeout": 0.3}) as served:
        reader, writer = await served.connect()
        writer.write(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await answer(reader))[0] == 401

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert await is_closed(reader) == b""
        dripping.cancel()
        writer.close()


FULL = {"detail": "The server has as many connections as MAX_CONNECTIONS allows; try again later."}


@on_uvloop
async def test_beyond_the_limit_only_probes_are_answered() -> None:
    async with serve(limits={"max_connections": 2}) as served:
        for _ in range(2):
            assert (await answer(await held(served, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")))[
                0
            ] == 200
        status, headers, body = await ask(served, POST + b"\r\n")
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert body == FULL
        _, _, body = await ask(served, POST.replace(b"/speak", b"/v1/a") + b"\r\n")
        assert body["error"]["message"] == FULL["detail"]
        status, headers, _ = await ask(served, GET + b"\r\n")
        assert (status, headers["connection"]) == (200, "close")


async def held(served: Served, request: bytes) -> asyncio.StreamReader:
    """The reader of a connection that stays open."""
    reader, writer = await served.connect()
    served.held.append(writer)
    writer.write(request)
    return reader


@on_uvloop
async def test_probes_get_through_a_flood_of_silent_connections() -> None:
    async with serve(limits={"max_connections": 5}) as served:
        for _ in range(150):
            await held(served, b"")
        assert (await ask(served, GET + b"\r\n"))[0] == 200
        assert len(served.state.connections) <= 5 + 64


def test_a_reserved_connection_has_less_time_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_RESERVED_SECONDS", 0.1)

    async def run() -> None:
        async with serve(limits={"max_connections": 1}) as served:
            await held(served, b"")
            assert await is_closed(await held(served, b"")) == b""
            assert len(served.state.connections) == 1

    uvloop.run(run())


@on_uvloop
async def test_an_answer_that_the_client_does_not_read_is_aborted() -> None:
    async with serve(limits={"send_timeout": 0.4}) as served:
        await held(served, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            while not served.state.total_requests:
                await asyncio.sleep(0.01)
        await served.until_none_is_open()


@on_uvloop
async def test_a_stream_that_the_client_does_not_read_is_aborted() -> None:
    async with serve(limits={"send_timeout": 0.4}) as served:
        await held(served, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            await served.cancelled.wait()
        await served.until_none_is_open()


@on_uvloop
async def test_a_slow_download_survives() -> None:
    async with serve(limits={"send_timeout": 0.4, "max_connections": 5}) as served:
        assert isinstance(served.address, tuple)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, served.address)
            await loop.sock_sendall(client, b"GET /large HTTP/1.0\r\n\r\n")
            taken, until = 0, loop.time() + 1.5
            while data := await loop.sock_recv(client, 1 << 17):
                taken += len(data)
                if loop.time() < until:
                    await asyncio.sleep(0.05)
        assert taken > LARGE


@pytest.mark.parametrize("path", [b"/a", b"/refuse"])
@on_uvloop
async def test_while_it_drains_each_answer_is_the_last_of_its_connection(path: bytes) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(GET + b"\r\n")
        assert "connection" not in (await answer(reader))[1]
        served.draining = True
        writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await answer(reader))[1]["connection"] == "close"
        assert await is_closed(reader) == b""
        writer.close()


@on_uvloop
async def test_while_it_drains_a_client_that_sends_a_body_gets_its_refusal() -> None:
    async with serve() as served:
        served.draining = True
        reader, writer = await served.connect()
        writer.write(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 600000\r\n\r\n")
        # The answer comes before the body, which must not be answered with a reset.
        assert (await answer(reader))[1]["connection"] == "close"
        for _ in range(6):
            writer.write(b"x" * 100_000)
            await writer.drain()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "unix"])
@on_uvloop
async def test_a_client_that_closes_its_sending_side_gets_its_answer(
    where: str, tmp_path: Path
) -> None:
    async with serve(str(tmp_path / "socket") if where == "unix" else where) as served:
        reader, writer = await served.connect()
        writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.write_eof()
        await served.started.wait()
        await asyncio.sleep(0.3)  # long enough to notice a disconnected client
        assert not served.cancelled.is_set()
        served.release.set()
        status, headers, body = await answer(reader)
        assert (status, headers["connection"], body["path"]) == (200, "close", "/wait")
        assert await is_closed(reader) == b""
        writer.close()


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "unix"])
@on_uvloop
async def test_a_client_that_disconnects_ends_its_request(where: str, tmp_path: Path) -> None:
    async with serve(str(tmp_path / "socket") if where == "unix" else where) as served:
        _, writer = await served.connect()
        writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await served.started.wait()
        writer.close()
        async with asyncio.timeout(5):
            await served.cancelled.wait()
        await served.until_none_is_open()
