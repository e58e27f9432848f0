"""The items of a response while they are generated: a message of the assistant, or a call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

from openresponses_types import types

from llm_sidecar.services.answers import TextPart, ToolCallPart
from osiris.openai.logprobs import chat_logprobs
from osiris.openai.schemas.response_object import (
    ArgumentsDoneEvent,
    Event,
    ItemEvent,
    OutputItem,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]


def new_id(kind: str) -> str:
    """A random id, such as `resp_1b4e28ba2fa141d2883f0016d3cca427`."""
    return f"{kind}_{uuid.uuid4().hex}"


class ItemInProgress:
    """An item of the output; its methods return the events about it."""

    def __init__(self, kind: str, index: int, number: Callable[[], int]) -> None:
        """Generates nothing yet.

        Args:
            kind: the prefix of its id.
            index: its position in the output.
            number: returns the next sequence number.
        """
        self.id, self._index, self._number = new_id(kind), index, number

    def begin(self) -> Iterator[Event]:
        """The empty item."""
        yield self._item_event("response.output_item.added", "in_progress")

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """The whole item."""
        yield self._item_event("response.output_item.done", status)

    def item(self, status: ItemStatus) -> OutputItem:
        """The item so far."""
        raise NotImplementedError

    def _item_event(
        self,
        kind: Literal["response.output_item.added", "response.output_item.done"],
        status: ItemStatus,
    ) -> ItemEvent:
        return ItemEvent(
            type=kind,
            sequence_number=self._number(),
            output_index=self._index,
            item=self.item(status),
        )

    def _at(self) -> dict[str, Any]:
        """The fields that the other events have in common."""
        return {
            "sequence_number": self._number(),
            "item_id": self.id,
            "output_index": self._index,
        }


class MessageInProgress(ItemInProgress):
    """A message of the assistant, which has one part."""

    def __init__(self, index: int, number: Callable[[], int]) -> None:
        super().__init__("msg", index, number)
        self._text = ""
        self._logprobs: list[types.LogProb] = []

    def begin(self) -> Iterator[Event]:
        """The empty message and its empty part."""
        yield from super().begin()
        yield types.ResponseContentPartAddedStreamingEvent(
            type="response.content_part.added", content_index=0, part=self._part(), **self._at()
        )

    def add(self, part: TextPart) -> Event:
        """New text."""
        logprobs = [types.LogProb(**one) for one in chat_logprobs(part.logprobs)["content"]]
        self._text += part.text
        self._logprobs += logprobs
        return types.ResponseOutputTextDeltaStreamingEvent(
            type="response.output_text.delta",
            content_index=0,
            delta=part.text,
            logprobs=logprobs,
            **self._at(),
        )

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """The whole text, part and message."""
        yield types.ResponseOutputTextDoneStreamingEvent(
            type="response.output_text.done",
            content_index=0,
            text=self._text,
            logprobs=self._logprobs,
            **self._at(),
        )
        yield types.ResponseContentPartDoneStreamingEvent(
            type="response.content_part.done", content_index=0, part=self._part(), **self._at()
        )
        yield from super().end(status)

    def item(self, status: ItemStatus) -> OutputItem:
        """The message, without its part until it ends."""
        content = [] if status == "in_progress" else [self._part()]
        return types.Message(
            type="message", id=self.id, status=status, role="assistant", content=content
        )

    def _part(self) -> types.OutputTextContent:
        return types.OutputTextContent(
            type="output_text", text=self._text, annotations=[], logprobs=self._logprobs
        )


class CallInProgress(ItemInProgress):
    """A call of a function.

    Attributes:
        call_id: of the call.
    """

    def __init__(self, index: int, number: Callable[[], int], call: ToolCallPart) -> None:
        """See `ItemInProgress`.

        Args:
            call: its first piece, whose arguments are still to be added.
        """
        super().__init__("fc", index, number)
        self.call_id, self._name = call.call_id, call.name
        self._arguments = ""

    def add(self, part: ToolCallPart) -> Event:
        """New text of the arguments."""
        self._arguments += part.arguments
        return types.ResponseFunctionCallArgumentsDeltaStreamingEvent(
            type="response.function_call_arguments.delta", delta=part.arguments, **self._at()
        )

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """The whole arguments and call."""
        yield ArgumentsDoneEvent(
            type="response.function_call_arguments.done",
            name=self._name,
            arguments=self._arguments,
            **self._at(),
        )
        yield from super().end(status)

    def item(self, status: ItemStatus) -> OutputItem:
        """The call with its arguments so far."""
        return types.FunctionCall(
            type="function_call",
            id=self.id,
            call_id=self.call_id,
            name=self._name,
            arguments=self._arguments,
            status=status,
        )
