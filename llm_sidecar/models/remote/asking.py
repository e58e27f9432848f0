"""Requests a completion or scores from one server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from llm_sidecar.deadline import Deadline
from llm_sidecar.engines.base import FinishReason, Message
from llm_sidecar.errors import SidecarError
from llm_sidecar.models.base import ChoiceScores, Delta, GenerationRequest, RefusedRequest
from llm_sidecar.models.identity import ModelIdentity
from llm_sidecar.models.remote import scores
from llm_sidecar.models.remote.chunks import Chunk, ErrorInStream, Usage, read_chunk
from llm_sidecar.models.remote.decisions import decision_body, read_decision
from llm_sidecar.models.remote.guiding import FREE_TEXT, forced
from llm_sidecar.models.remote.json_text import FirstObject
from llm_sidecar.models.remote.refusals import Refused, broken, error_in_stream
from llm_sidecar.models.remote.requests import remote_request
from llm_sidecar.models.remote.server import Server
from llm_sidecar.telemetry.calls import ModelCall

RUNTIME: Final = "remote"
_IDENTITY: Final = ModelIdentity(runtime=RUNTIME)
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
        # Together with `served_name`, before a swap can change it.
        _begin(call, server)
        # In a thread, because new guidance takes some milliseconds.
        asked = await asyncio.to_thread(
            remote_request, request, server.served_name, server.capabilities
        )
        completion = _Completion(server, call, only_object=asked.in_prompt)
        texts: list[str] = []
        events = server.connection.events(asked.path, asked.body, asked.most_bytes, deadline)
        async with contextlib.aclosing(events):
            while not completion.is_whole:
                data = await _next(events, completion)
                if data is None:
                    break
                if (delta := completion.feed(data)) is not None:
                    texts.append(delta.text)
                    yield delta
        last = completion.end()
    # Not within `asking`: a schema that the server cannot follow must not open its circuit breaker.
    if request.check_answer and request.guidance is not None and last.finish_reason == "stop":
        await asyncio.to_thread(_check_answer, server, request.guidance, "".join(texts))
    yield last


async def score(
    server: Server,
    call: ModelCall,
    messages: Sequence[Message],
    choices: Sequence[str],
    deadline: Deadline,
) -> AsyncGenerator[ChoiceScores, None]:
    """Scores some answers on one server; yields once. See `scores`."""
    with server.asking(call):
        _begin(call, server)
        # A swap may change it between two requests.
        model = server.served_name
        found = await _by_decision(server, model, messages, choices, deadline)
        if found is None:
            found = await _by_answer(server, model, messages, choices, deadline)
        yield ChoiceScores(found, adapter=call.adapter)


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
        chunk = _read(self._name, data)
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


def _begin(call: ModelCall, server: Server) -> None:
    call.begun = time.monotonic()
    call.served_by, call.identity = server.label, _IDENTITY
    in_use = server.adapters.in_use
    call.adapter = None if in_use is None else in_use.adapter.name


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


def _read(name: str, data: bytes) -> Chunk:
    try:
        return read_chunk(data)
    except ErrorInStream as error:
        raise error_in_stream(name, error.error) from None
    except ValueError as error:
        raise broken(name, f"sends an answer that cannot be read ({error})") from None


async def _by_decision(
    server: Server,
    model: str,
    messages: Sequence[Message],
    choices: Sequence[str],
    deadline: Deadline,
) -> dict[str, float] | None:
    """The scores by `/v1/decisions`; None if the server refuses this question."""
    assert server.capabilities is not None
    if not server.capabilities.decisions:
        return None
    body = decision_body(model, scores.question_text(messages), choices)
    try:
        found = read_decision(await server.connection.post("/decisions", body, deadline))
    except (Refused, RefusedRequest, ValueError):
        return None
    return {choice: found.get(choice, 0.0) for choice in choices}


async def _by_answer(
    server: Server,
    model: str,
    messages: Sequence[Message],
    choices: Sequence[str],
    deadline: Deadline,
) -> dict[str, float]:
    """The scores from the beginning of an answer: its log probabilities, else its text."""
    assert server.capabilities is not None
    start = scores.start_of_answer(messages)
    try:
        answer = await _answer(server, model, messages, {}, deadline)
    except (Refused, RefusedRequest):
        if not start:
            raise
        # Not every chat template accepts an unfinished turn of the assistant.
        messages, start = messages[:-1], ""
        answer = await _answer(server, model, messages, {}, deadline)
    if not answer.logprobs:
        return scores.from_text(answer.text, start, choices)
    answers = [answer.logprobs]
    text = scores.undecided(answer.logprobs, start, choices)
    fields = None if text is None else forced(server.capabilities.ways, text)
    if fields is not None:
        answers.append((await _answer(server, model, messages, fields, deadline)).logprobs)
    return scores.from_logprobs(answers, start, choices)


async def _answer(
    server: Server,
    model: str,
    messages: Sequence[Message],
    fields: dict[str, Any],
    deadline: Deadline,
) -> Chunk:
    assert server.capabilities is not None
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": scores.ANSWER_TOKENS,
        "temperature": 0.0,
        **(fields or FREE_TEXT),
    }
    if server.capabilities.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": server.capabilities.top_logprobs}
    return _read(
        server.connection.name, await server.connection.post("/chat/completions", body, deadline)
    )
