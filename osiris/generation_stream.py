"""Answers to generations: one response at the end, or server-sent events while they run.

The events are those of `GenerationEvent`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Final, Generic, NamedTuple, TypeVar

from fastapi import Request, Response
from sse_starlette import ServerSentEvent

from llm_sidecar.errors import SidecarError
from llm_sidecar.models.base import Delta
from llm_sidecar.proposals import Proposed
from llm_sidecar.services.idempotency import Attempt, Idempotency
from llm_sidecar.services.proposal_run import AssessedProposal
from osiris.disconnects import cancel_on_disconnect
from osiris.errors import error_body, row_of
from osiris.event_stream import Events, event_stream, wants_events
from osiris.idempotency import REPLAYED, answered_once, begin_once, keep
from osiris.middleware.unexpected_errors import unexpected_detail
from osiris.response_headers import HEADERS
from osiris.schemas.generation import ModelId
from osiris.streams import result_of

Result = TypeVar("Result")
_NAMES: Final = {name.lower(): name for name in HEADERS}


class Generation(NamedTuple, Generic[Result]):
    """What a route generates.

    Attributes:
        model: the model of the first deltas; after a proposal, the deltas are from Hermes.
        run: runs an attempt; yields deltas and results.
        result: the type of the last result.
        answer: makes the response from the last result.
    """

    model: ModelId
    run: Callable[[Attempt], AsyncGenerator[object, None]]
    result: type[Result]
    answer: Callable[[Result], Response]


async def answered(
    request: Request, key: str | None, idempotency: Idempotency, generation: Generation[Any]
) -> Response:
    """The answer, as events if the client accepts them; once for each `Idempotency-Key`.

    A client that disconnects cancels the generation. A later request with the same key then
    continues after the last stored step.
    """
    if wants_events(request):
        return await _streamed(request, key, idempotency, generation)

    async def answer(attempt: Attempt) -> Response:
        return generation.answer(await result_of(generation.run(attempt), generation.result))

    return await cancel_on_disconnect(request, answered_once(request, key, idempotency, answer))


async def _streamed(
    request: Request, key: str | None, idempotency: Idempotency, generation: Generation[Any]
) -> Response:
    begun = await begin_once(request, key, idempotency)
    headers = {}
    if isinstance(begun, Response):
        events, headers[REPLAYED] = _replayed(begun), "true"
    else:
        events = _generated(idempotency, begun, generation)
    return await event_stream(request, events, functools.partial(_failed, request), headers)


async def _generated(
    idempotency: Idempotency, attempt: Attempt, generation: Generation[Any]
) -> Events:
    """The events of an attempt. The answer is kept before the last events are sent."""
    progress, response = _Progress(generation.model), None
    try:
        async with contextlib.aclosing(generation.run(attempt)) as items:
            async for item in items:
                if isinstance(item, generation.result):
                    response = generation.answer(item)
                    await keep(idempotency, attempt, response)
                if (event := progress.event(item)) is not None:
                    yield event
        assert response is not None
        for event in _last(response):
            yield event
    finally:
        idempotency.end(attempt)


async def _replayed(response: Response) -> Events:
    for event in _last(response):
        yield event


class _Progress:
    """Makes events of deltas and results, and marks where a model begins again."""

    def __init__(self, model: ModelId) -> None:
        self._model = model
        self._ended = self._restarts = False

    def event(self, item: object) -> ServerSentEvent | None:
        """The event of an item, or None."""
        if isinstance(item, Delta):
            return self._token(item)
        if isinstance(item, Proposed):
            self._model, self._ended, self._restarts = "hermes", False, False
            return _event("proposal", item.proposal)
        if isinstance(item, AssessedProposal):
            text, score = item.assessment.text, item.rating.score
            return _event("assessment", {"text": text, "score": score})
        return None

    def _token(self, delta: Delta) -> ServerSentEvent | None:
        self._restarts |= self._ended
        self._ended = delta.finish_reason is not None
        if not delta.text:
            return None
        token: dict[str, Any] = {"text": delta.text, "model": self._model}
        if self._restarts:
            token["restart"] = True
            self._restarts = False
        return _event("token", token)


def _last(response: Response) -> Iterator[ServerSentEvent]:
    """The last events: the headers and the body of the plain answer."""
    headers = {_NAMES[name]: value for name, value in response.headers.items() if name in _NAMES}
    yield _event("headers", headers)
    yield ServerSentEvent(bytes(response.body).decode(), event="done")


def _failed(request: Request, error: Exception) -> ServerSentEvent:
    """The event of an error: the body and the status of the plain answer."""
    if not isinstance(error, SidecarError):
        return _event("error", {"detail": unexpected_detail(request.scope), "status": 500})
    fields: dict[str, Any] = {**error_body(error), "status": row_of(type(error)).status}
    if error.retry_after is not None:
        fields["retry_after"] = error.retry_after
    return _event("error", fields)


def _event(name: str, data: dict[str, Any]) -> ServerSentEvent:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return ServerSentEvent(text, event=name)
