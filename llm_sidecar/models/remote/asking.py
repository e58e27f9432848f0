"""Requests a completion from one server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import FinishReason
from llm_sidecar.errors import InvalidRequest, SidecarError
from llm_sidecar.json_text import FirstObject
from llm_sidecar.models.base import Delta, GenerationRequest
from llm_sidecar.models.remote.chunks import Chunk, Usage, read_chunk
from llm_sidecar.models.remote.refusals import broken
from llm_sidecar.models.remote.requests import RemoteRequest, remote_request
from llm_sidecar.models.remote.server import Server
from llm_sidecar.telemetry.calls import ModelCall

_USAGE_SECONDS: Final = 2.0
"""Seconds to wait for the token counts after the end of the text."""


async def generate(
    server: Server, call: ModelCall, request: GenerationRequest, deadline: Deadline
) -> AsyncGenerator[Delta, None]:
    """Generates on one server; closing it closes the connection.

    Raises:
        SidecarError: InvalidAnswer if the answer breaks a schema to check.
        TimeoutError: the deadline passes.
    """
    with server.asking(call):
        assert server.capabilities is not None
        # In a thread, because new guidance takes some milliseconds.
        outgoing = await asyncio.to_thread(
            remote_request, request, server.served_name, server.capabilities
        )
        completion = _Completion(server, call, only_object=outgoing.in_prompt)
        checked = request.guidance if request.check_answer else None
        texts: list[str] = []
        has_begun = False
        events = _events(server, outgoing, deadline, fit_context=request.fit_context)
        async with contextlib.aclosing(events):
            while not completion.is_whole:
                data = await _next(events, completion)
                if data is None:
                    break
                if (delta := completion.feed(data)) is not None:
                    if not has_begun:
                        server.answers()
                        has_begun = True
                    if checked is not None:
                        texts.append(delta.text)
                    yield delta
        last = completion.end()
    # Not within `asking`: a schema that the server cannot follow must not open its circuit breaker.
    if checked is not None and last.finish_reason == "stop":
        await asyncio.to_thread(_check_answer, server, checked, "".join(texts))
    yield last


class _Completion:
    """A completion as it is streamed.

    Attributes:
        finish_reason: None before the end of the text.
        is_whole: whether the text and the counts are complete.
    """

    def __init__(self, server: Server, call: ModelCall, *, only_object: bool) -> None:
        self.finish_reason: FinishReason | None = None
        self.is_whole = False
        self._name = server.connection.name
        self._call = call
        self._object = FirstObject() if only_object else None
        self._pieces = 0
        self._usage: Usage | None = None

    def feed(self, data: bytes) -> Delta | None:
        """The delta of an event; None if it has no text.

        Raises:
            SidecarError: the server reports an error, or the event cannot be read.
        """
        chunk = read_chunk(self._name, data)
        self._usage = chunk.usage or self._usage
        text = "" if self.finish_reason else chunk.text
        self._pieces += bool(text)
        self._note_end(chunk)
        if self._object is not None:
            text = self._object.feed(text)
            if self._object.is_whole:
                self.finish_reason, self.is_whole = "stop", True
        if not text and not chunk.logprobs:
            return None
        self._note_progress(None)
        return Delta.of(self._call, text, chunk.logprobs)

    def end(self) -> Delta:
        """The last delta.

        Raises:
            InvalidAnswer: the answer was cut off.
        """
        if self.finish_reason is None:
            raise broken(self._name, "ended its answer before it was complete")
        self._note_progress(self.finish_reason)
        return Delta.of(self._call, "")

    def _note_end(self, chunk: Chunk) -> None:
        if chunk.is_end and self._pieces:
            self.finish_reason = self.finish_reason or "stop"
        self.finish_reason = self.finish_reason or chunk.finish_reason
        self.is_whole = chunk.is_end or (self.finish_reason is not None and self._usage is not None)

    def _note_progress(self, finish_reason: FinishReason | None) -> None:
        usage = self._usage or Usage(0, 0, 0)
        self._call.progressed(
            time.monotonic(),
            prompt_tokens=usage.prompt_tokens,
            # Until the server reports counts, assume one token for each piece of text.
            completion_tokens=usage.completion_tokens or self._pieces,
            cached_tokens=usage.cached_tokens,
            finish_reason=finish_reason,
        )


def _check_answer(server: Server, schema: str, answer: str) -> None:
    """Raises InvalidAnswer unless a finished answer follows its schema."""
    # `remote_request` has imported it.
    from llm_sidecar.engines.answer_check import follows

    if not follows(schema, answer):
        raise broken(server.connection.name, "sent an answer that does not follow its JSON schema")


async def _events(
    server: Server, outgoing: RemoteRequest, deadline: Deadline, *, fit_context: bool
) -> AsyncGenerator[bytes, None]:
    """The events of an answer.

    With `fit_context`, a request that exceeds the context is sent again without `max_tokens`: the
    server then takes what the prompt leaves, which is less.
    """
    bodies = [outgoing.body]
    if fit_context:
        bodies.append(
            {name: value for name, value in outgoing.body.items() if name != "max_tokens"}
        )
    for number, body in enumerate(bodies, 1):
        events = server.connection.events(outgoing.path, body, outgoing.most_bytes, deadline)
        try:
            async with contextlib.aclosing(events):
                async for data in events:
                    yield data
            return
        except InvalidRequest as error:
            if number == len(bodies) or not error.exceeds_context:
                raise


async def _next(events: AsyncGenerator[bytes, None], completion: _Completion) -> bytes | None:
    """The next event; None at the end, or if nothing follows the end of the text."""
    ended = completion.finish_reason is not None
    try:
        async with asyncio.timeout(_USAGE_SECONDS if ended else None):
            return await anext(events, None)
    except (TimeoutError, SidecarError):
        if not ended:
            raise
        return None
