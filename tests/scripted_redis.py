"""A Redis of a few commands, whose answers a test scripts, and a proxy that holds bytes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Self

Script = Callable[[str, list[str]], str | None]
"""Takes a command and its arguments; returns an error to answer with, or None."""


class ScriptedRedis:
    """Knows MULTI, EXEC, WATCH, GET, SET, XADD, PUBLISH, SUBSCRIBE and PING.

    Attributes:
        entries: the data of the entries that were added, in their order.
        published: the payloads that were published, in their order.
    """

    def __init__(self, script: Script, *, abort: bool = True) -> None:
        """With `abort`, an error of a queued command aborts its transaction, as in Redis. Otherwise
        the error is an item of the reply to EXEC, as with some proxies."""
        self.entries: list[str] = []
        self.published: list[str] = []
        self._script = script
        self._abort = abort
        self._keys: dict[str, str] = {}
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await _end(self._clients)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        queued: list[list[str]] | None = None
        aborted = False
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                words = await read_command(reader)
                name = words[0].upper()
                if name == "MULTI":
                    queued, aborted, answer = [], False, "+OK\r\n"
                elif name == "EXEC":
                    assert queued is not None
                    answer = self._execute(queued, aborted)
                    queued = None
                elif queued is not None:
                    error = self._script(name, words[1:]) if self._abort else None
                    if error == "hang up":
                        break
                    aborted = aborted or error is not None
                    answer = "+QUEUED\r\n" if error is None else f"-{error}\r\n"
                    queued.append(words)
                else:
                    error = self._script(name, words[1:])
                    answer = self._run(words) if error is None else f"-{error}\r\n"
                writer.write(answer.encode())
                await writer.drain()
        self._clients.discard(task)
        await close(writer)

    def _execute(self, queued: list[list[str]], aborted: bool) -> str:
        if aborted:
            return "-EXECABORT Transaction discarded because of previous errors.\r\n"
        answers = []
        for words in queued:
            error = None if self._abort else self._script(words[0].upper(), words[1:])
            answers.append(self._run(words) if error is None else f"-{error}\r\n")
        return f"*{len(answers)}\r\n" + "".join(answers)

    def _run(self, words: list[str]) -> str:
        name, arguments = words[0].upper(), words[1:]
        if name == "XADD":
            self.entries.append(arguments[arguments.index("data") + 1])
            return "$3\r\n1-1\r\n"
        if name == "PUBLISH":
            self.published.append(arguments[1])
            return ":1\r\n"
        if name == "SUBSCRIBE":
            channel = arguments[0]
            return f"*3\r\n$9\r\nsubscribe\r\n${len(channel)}\r\n{channel}\r\n:1\r\n"
        if name == "SET":
            self._keys[arguments[0]] = arguments[1]
        if name == "GET":
            value = self._keys.get(arguments[0])
            return "$-1\r\n" if value is None else f"${len(value)}\r\n{value}\r\n"
        return "+PONG\r\n" if name == "PING" else "+OK\r\n"


async def read_command(reader: asyncio.StreamReader) -> list[str]:
    """The words of the next command of a client."""
    words = []
    for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2].decode())
    return words


class Proxy:
    """Passes bytes between clients and a port of this machine.

    Attributes:
        delay: seconds for which it holds back each piece that goes to the server.
        gate: while it is not set, the proxy holds back what goes to the server.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.delay = delay
        self.gate = asyncio.Event()
        self.gate.set()
        self._target = port
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await _end(self._pumps)

    def break_some(self, count: int) -> None:
        """Stops forwarding in `count` random directions, at once."""
        for pump in random.sample(list(self._pumps), min(count, len(self._pumps))):
            pump.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        for source, target, slow in ((reader, back, True), (there, writer, False)):
            pump = asyncio.create_task(self._pump(source, target, slow))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, slow: bool
    ) -> None:
        with suppress(ConnectionError, asyncio.CancelledError):
            while data := await source.read(1 << 16):
                if slow:
                    await self.gate.wait()
                    await asyncio.sleep(self.delay)
                target.write(data)
                await target.drain()
        # What the client sent before it disconnected still arrives.
        await close(target)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(list(tasks))


async def close(writer: asyncio.StreamWriter) -> None:
    """Ends a connection, even if the other side has ended it."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
