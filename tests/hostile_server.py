"""A server on a loopback port that speaks OpenAI's protocol until a test makes it misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self

from llm_sidecar import proposals

Write = Callable[[bytes], Awaitable[None]]
Behaviour = Callable[[Write, Any], Coroutine[None, None, None]]
"""Answers a streamed request with raw bytes of HTTP; the connection closes when it returns."""

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
PROPOSAL: Final = proposals.dumps(
    {
        "ticker": "ABC",
        "action": "pass",
        "new_stop_pct": None,
        "new_target_pct": None,
        "confidence": 0.5,
        "rationale": "It holds for now.",
    }
)


def event(content: str | None = None, finish: str | None = None, **fields: Any) -> bytes:
    """A chunk of a streamed chat completion."""
    choice = {"delta": {"content": content}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n".encode()


async def proposing(write: Write, body: Any) -> None:
    """Writes a valid proposal."""
    await write(HEAD)
    for at in range(0, len(PROPOSAL), 9):
        await write(event(PROPOSAL[at : at + 9]))
    counts = {"prompt_tokens": 5, "completion_tokens": 9}
    await write(event("", "stop", usage=counts) + b"data: [DONE]\n\n")


class HostileServer:
    """Lists one model and answers probes; `behaviour` answers the streamed requests.

        async with HostileServer() as server:
            server.behaviour = cut_off

    Attributes:
        url, port: the address of its API.
        behaviour: the answer to the next requests.
        asked: the number of streamed requests.
        schema_formats: how it takes a schema: `regex`, `grammar`, `json_schema`.
        disconnected: set when a client closes its connection before the answer has ended.
    """

    def __init__(self, port: int = 0) -> None:
        """Does not listen yet; port 0 means any free port."""
        self.url = ""
        self.port = port
        self.behaviour: Behaviour = proposing
        self.asked = 0
        self.schema_formats = {"regex"}
        self.disconnected = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line for line in head.lower().split("\r\n") if line.startswith("content-length")]
        body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b"{}"
        path, asked = head.split()[1], json.loads(body)
        if not asked.get("stream"):
            writer.write(_plain(self._probed(path, asked)))
            await writer.drain()
            return
        self.asked += 1

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        answering = asyncio.create_task(self.behaviour(write, asked))
        gone = asyncio.create_task(reader.read())
        try:
            await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            else:
                self.disconnected.set()
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)

    def _probed(self, path: str, asked: Any) -> Any:
        """The answer to a request that is not streamed; None for 404."""
        if path == "/v1/models":
            return {"data": [{"id": "model"}]}
        if path != "/v1/chat/completions":
            return None
        taken = asked.keys() & {"regex", "grammar"} | {asked.get("response_format", {}).get("type")}
        text = "7" if taken.isdisjoint(self.schema_formats) else '{"osiris":"yes"}'
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def _plain(answer: Any) -> bytes:
    """An answer of JSON; None is a 404."""
    status = "404 Not Found" if answer is None else "200 OK"
    body = json.dumps(answer).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
