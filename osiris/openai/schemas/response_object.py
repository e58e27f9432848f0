"""The answer of `/v1/responses`, and the events that carry it or an item of it.

The types are those of Open Responses (https://www.openresponses.org) from `openresponses_types`,
with the fields of OpenAI's document that they lack.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from openresponses_types import types
from pydantic import BaseModel, Field

OutputItem = types.Message | types.FunctionCall
Lifecycle = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class InputTokensDetails(types.InputTokensDetails):
    """The cached part of the input."""

    cache_write_tokens: int


class Usage(types.Usage):
    """The tokens of a response."""

    input_tokens_details: InputTokensDetails


class JsonSchemaFormat(types.JsonSchemaResponseFormat):
    """JSON that follows a schema; Open Responses leaves the schema out."""

    schema_: Annotated[dict[str, Any], Field(alias="schema")]  # type: ignore[assignment]


class TextField(types.TextField):
    """How the text of a response looks."""

    format: types.TextResponseFormat | types.JsonObjectResponseFormat | JsonSchemaFormat


class ResponseObject(types.ResponseResource):
    """A response."""

    text: TextField
    usage: Usage | None


class ResponseEvent(BaseModel):
    """The response has a new status."""

    type: Lifecycle
    sequence_number: int
    response: ResponseObject


class ItemEvent(BaseModel):
    """An item of the output begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class ArgumentsDoneEvent(types.ResponseFunctionCallArgumentsDoneStreamingEvent):
    """The arguments of a call are complete."""

    name: str


class ErrorEvent(types.ErrorStreamingEvent):
    """An error after the response has started. OpenAI's document has the fields at the top level;
    its servers send them in `error`."""

    code: str
    message: str
    param: str | None


Event = (
    ResponseEvent
    | ItemEvent
    | ErrorEvent
    | types.ResponseContentPartAddedStreamingEvent
    | types.ResponseContentPartDoneStreamingEvent
    | types.ResponseOutputTextDeltaStreamingEvent
    | types.ResponseOutputTextDoneStreamingEvent
    | types.ResponseFunctionCallArgumentsDeltaStreamingEvent
    | ArgumentsDoneEvent
)


def as_json(model: BaseModel) -> str:
    """JSON text of a response or an event, without the fields that do not apply."""
    return model.model_dump_json(by_alias=True, exclude_unset=True)
