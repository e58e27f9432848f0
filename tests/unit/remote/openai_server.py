"""A server in memory that speaks OpenAI's protocol; a test sets its capabilities and answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import httpx

PROBE: Final = '{"osiris":"yes"}'
QUESTION: Final = [{"role": "user", "content": "Write a JSON object."}]


def chunk(content: Any = "", finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a streamed chat completion."""
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}], **fields}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk with the counts."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def events(*chunks: object) -> list[bytes]:
    """Server-sent events, and the end of the stream."""
    lines = [f"data: {json.dumps(one)}\n\n".encode() for one in chunks]
    return [*lines, b"data: [DONE]\n\n"]


def decided(confidence: float, **probabilities: float) -> dict[str, Any]:
    """The answer of `/v1/decisions` to a choice question; `_7=0.5` is the answer 7."""
    found = [
        {"value": name.removeprefix("_"), "probability": share}
        for name, share in probabilities.items()
    ]
    answer = {"type": "choice", "probabilities": found, "confidence": confidence}
    return {"answers": [answer], "model": "m", "usage": {}}


class Stream(httpx.AsyncByteStream):
    """The body of an answer; an exception in it is raised.

    Attributes:
        closed: whether the client has closed it.
    """

    def __init__(self, pieces: Iterable[bytes | Exception]) -> None:
        self._pieces = list(pieces)
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


class GatedStream(Stream):
    """A body that begins when the test opens the gate.

    Attributes:
        begun: set when the client waits for it.
        gate: lets it begin.
    """

    def __init__(self, pieces: Iterable[bytes | Exception]) -> None:
        super().__init__(pieces)
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun.set()
        await self.gate.wait()
        async for piece in super().__aiter__():
            yield piece


Answer = Stream | httpx.Response | Exception


class OpenAIServer:
    """Answers probes by its capabilities, and other requests in order.

    Attributes:
        models: the names that it lists; None for an error.
        listed_adapters: the names of the adapters of the first model that it lists.
        schema_formats: the formats in which it takes a schema.
        top_logprobs: the maximum that it returns.
        least_logprobs: the minimum that it returns, whatever is requested.
        decisions, adapters: whether it supports them.
        decided: its answer to the probe of decisions.
        answers: the answers to the next requests other than probes.
        requests: the path and the body of each such request.
        probes: the number of probes.
        headers: the headers of the last request.
        away: the error of each connection, or None.
        is_connecting: whether each request gets a new connection.
        is_silent: whether it answers nothing.
    """

    def __init__(self, *answers: Answer) -> None:
        self.models: list[str] | None = ["org/m-1"]
        self.listed_adapters: list[str] = []
        self.schema_formats = {"regex", "grammar", "json_schema"}
        self.top_logprobs = 20
        self.least_logprobs = 0
        self.decisions = False
        self.adapters = False
        self.decided = decided(0.5, yes=0.5, no=0.5)
        self.answers = list(answers)
        self.requests: list[tuple[str, Any]] = []
        self.probes = 0
        self.headers = httpx.Headers()
        self.away: Exception | None = None
        self.is_connecting = False
        self.is_silent = False

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answers a request."""
        if self.away is not None:
            raise self.away
        if self.is_connecting:
            await request.extensions["trace"]("connection.connect_tcp.complete", {})
        if self.is_silent:
            await asyncio.Event().wait()
        self.headers = request.headers
        body = json.loads(request.content) if request.content else None
        path = request.url.path
        if (answer := self._probe(path, body)) is not None:
            self.probes += 1
            return _unread(answer)
        self.requests.append((path, body))
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return httpx.Response(200, stream=found) if isinstance(found, Stream) else _unread(found)

    def _probe(self, path: str, body: Any) -> httpx.Response | None:
        if path == "/v1/models" and self.models is None:
            return httpx.Response(500)
        if path == "/v1/models":
            data: list[dict[str, Any]] = [{"id": name} for name in self.models or ()]
            data += [{"id": name, "parent": data[0]["id"]} for name in self.listed_adapters]
            return httpx.Response(200, json={"data": data})
        if path == "/v1/load_lora_adapter" and body == {}:
            return httpx.Response(400 if self.adapters else 404)
        if path == "/v1/decisions" and body["input"] == "It rains.":
            answer = httpx.Response(200, json=self.decided)
            return answer if self.decisions else httpx.Response(404)
        if body.get("messages") == QUESTION:
            return httpx.Response(200, json={"choices": [self._answer(body)]})
        return None

    def _answer(self, body: Any) -> dict[str, Any]:
        """The answer to the probes that are chats."""
        asked = body.keys() & {"regex", "grammar"}
        if "json_schema" in body.get("response_format", {}):
            asked.add("json_schema")
        guided = not asked.isdisjoint(self.schema_formats)
        choice: dict[str, Any] = {"message": {"content": PROBE if guided else "Certainly."}}
        if body.get("logprobs") and self.top_logprobs:
            most = max(self.least_logprobs, min(self.top_logprobs, body["top_logprobs"]))
            tops = [{"token": str(n), "logprob": -1.0} for n in range(most)]
            choice["logprobs"] = {"content": [{"token": "C", "logprob": 0, "top_logprobs": tops}]}
        return choice


def _unread(answer: httpx.Response) -> httpx.Response:
    """An unread response, as from a network."""
    headers = {k: v for k, v in answer.headers.items() if k != "content-length"}
    return httpx.Response(answer.status_code, headers=headers, stream=Stream([answer.content]))


def transport(**servers: OpenAIServer) -> httpx.MockTransport:
    """Sends requests to `http://NAME/…` to the server with this name."""

    async def handle(request: httpx.Request) -> httpx.Response:
        return await servers[request.url.host](request)

    return httpx.MockTransport(handle)
