"""The events of a response, from the parts of a model's answer.

events = ResponseEvents(response_of(body), request.scope)
async for event in events.of(parts):
    ...
events.response
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Iterator

from openresponses_types import types
from starlette.types import Scope

from llm_sidecar.models.base import Completion
from llm_sidecar.services.answers import Finished, Part, TextPart, ToolCallPart
from osiris.openai.errors import object_of
from osiris.openai.response_items import CallInProgress, ItemStatus, MessageInProgress
from osiris.openai.schemas.response_object import (
    ErrorEvent,
    Event,
    InputTokensDetails,
    Lifecycle,
    OutputItem,
    ResponseEvent,
    ResponseObject,
    Usage,
)


class ResponseEvents:
    """Makes the events of one response.

    Attributes:
        response: as of the last event.
        finished: the end of the answer; None before it.
    """

    def __init__(self, response: ResponseObject, scope: Scope) -> None:
        """Sends nothing yet.

        Args:
            response: the initial response, without output.
            scope: of the request, for errors.
        """
        self.response = response
        self.finished: Finished | None = None
        self._scope = scope
        self._number = itertools.count().__next__
        self._item: MessageInProgress | CallInProgress | None = None
        self._output: list[OutputItem] = []

    async def of(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Event, None]:
        """The events of an answer, whose last part is `Finished`.

        The first event comes with the first part, so that an earlier error can have its own status.

        Args:
            parts: of the answer; closed at the end.

        Raises:
            Exception: the answer failed. If there were earlier events, the last two describe it.
        """
        begun = False
        async with contextlib.aclosing(parts):
            try:
                async for part in parts:
                    if not begun:
                        begun = True
                        yield self._lifecycle("response.created")
                        yield self._lifecycle("response.in_progress")
                    for event in self.add(part):
                        yield event
            except Exception as error:
                if begun:
                    for event in self._failure(error):
                        yield event
                raise

    def error(self, error: Exception) -> ErrorEvent:
        """The event of an error."""
        described = object_of(error, self._scope)["error"]
        # Clients require a code here.
        described["code"] = described["code"] or described["type"]
        return ErrorEvent(
            type="error",
            sequence_number=self._number(),
            code=described["code"],
            message=described["message"],
            param=described["param"],
            error=described,
        )

    def add(self, part: Part) -> list[Event]:
        """The events of one part."""
        match part:
            case TextPart():
                return list(self._add_text(part)) if part.text or part.logprobs else []
            case ToolCallPart():
                return list(self._add_call(part))
            case Finished():
                return list(self._finish(part))

    def _add_text(self, part: TextPart) -> Iterator[Event]:
        message = self._item
        if not isinstance(message, MessageInProgress):
            yield from self._end_item("completed")
            message = self._item = MessageInProgress(len(self._output), self._number)
            yield from message.begin()
        yield message.add(part)

    def _add_call(self, part: ToolCallPart) -> Iterator[Event]:
        call = self._item
        if not isinstance(call, CallInProgress) or call.call_id != part.call_id:
            yield from self._end_item("completed")
            call = self._item = CallInProgress(len(self._output), self._number, part)
            yield from call.begin()
        if part.arguments:
            yield call.add(part)

    def _end_item(self, status: ItemStatus) -> Iterator[Event]:
        if self._item is not None:
            yield from self._item.end(status)
            self._output.append(self._item.item(status))
            self._item = None

    def _finish(self, finished: Finished) -> Iterator[Event]:
        if self._item is None and not self._output:
            # An answer without text is an empty message.
            self._item = MessageInProgress(0, self._number)
            yield from self._item.begin()
        is_whole = finished.reason != "length"
        yield from self._end_item("completed" if is_whole else "incomplete")
        response, self.finished = self.response, finished
        response.output, response.usage = list(self._output), usage_of(finished.completion)
        if is_whole:
            response.status, response.completed_at = "completed", int(time.time())
            yield self._lifecycle("response.completed")
        else:
            response.status = "incomplete"
            response.incomplete_details = types.IncompleteDetails(reason="max_output_tokens")
            yield self._lifecycle("response.incomplete")

    def _failure(self, error: Exception) -> Iterator[Event]:
        event = self.error(error)
        yield event
        # In a response, the code of a bad request has another name.
        code = {"invalid_request_error": "invalid_prompt"}.get(event.error.type, event.error.type)
        self.response.status = "failed"
        self.response.error = types.Error1(code=code, message=event.message)
        yield self._lifecycle("response.failed")

    def _lifecycle(self, kind: Lifecycle) -> ResponseEvent:
        # A copy, because the response may change before a stream sends the event.
        return ResponseEvent(
            type=kind, sequence_number=self._number(), response=self.response.model_copy()
        )


def usage_of(completion: Completion) -> Usage:
    """The tokens of a completion. The models have no reasoning tokens."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(
        input_tokens=prompt,
        input_tokens_details=InputTokensDetails(
            cached_tokens=completion.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=answer,
        output_tokens_details=types.OutputTokensDetails(reasoning_tokens=0),
        total_tokens=prompt + answer,
    )
