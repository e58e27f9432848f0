"""The events of a response, for answers that no model generates today."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from llm_sidecar.services.answers import Finished, Part, TextPart, ToolCallPart
from osiris.openai.response_events import ResponseEvents
from osiris.openai.response_input import response_of
from osiris.openai.schemas.responses import ResponseRequest
from tests.unit.fakes import completion

END = Finished("tool_calls", completion(""))


async def stream(*parts: Part) -> AsyncGenerator[Part, None]:
    for part in parts:
        yield part


async def events_of(*parts: Part) -> list[Any]:
    body = ResponseRequest.model_validate({"model": "hermes", "input": "Hi."})
    events = ResponseEvents(response_of(body), {"type": "http", "path": "/v1/responses"})
    return [event async for event in events.of(stream(*parts))]


async def test_text_and_calls_are_items_one_after_the_other() -> None:
    stream = await events_of(
        TextPart("Sell"),
        TextPart(" it."),
        ToolCallPart(0, "call_1", "sell", '{"size":'),
        ToolCallPart(0, "call_1", "sell", "1}"),
        ToolCallPart(1, "call_2", "tell", "{}"),
        TextPart("Done."),
        END,
    )
    assert [(event.type, getattr(event, "output_index", None)) for event in stream] == [
        ("response.created", None),
        ("response.in_progress", None),
        ("response.output_item.added", 0),
        ("response.content_part.added", 0),
        ("response.output_text.delta", 0),
        ("response.output_text.delta", 0),
        ("response.output_text.done", 0),
        ("response.content_part.done", 0),
        ("response.output_item.done", 0),
        ("response.output_item.added", 1),
        ("response.function_call_arguments.delta", 1),
        ("response.function_call_arguments.delta", 1),
        ("response.function_call_arguments.done", 1),
        ("response.output_item.done", 1),
        ("response.output_item.added", 2),
        ("response.function_call_arguments.delta", 2),
        ("response.function_call_arguments.done", 2),
        ("response.output_item.done", 2),
        ("response.output_item.added", 3),
        ("response.content_part.added", 3),
        ("response.output_text.delta", 3),
        ("response.output_text.done", 3),
        ("response.content_part.done", 3),
        ("response.output_item.done", 3),
        ("response.completed", None),
    ]
    assert [event.sequence_number for event in stream] == list(range(25))
    text, sell, tell, done = stream[-1].response.output
    assert [part.text for part in text.content] == ["Sell it."]
    assert (sell.call_id, sell.name, sell.arguments) == ("call_1", "sell", '{"size":1}')
    assert (tell.call_id, tell.name, tell.arguments) == ("call_2", "tell", "{}")
    assert [part.text for part in done.content] == ["Done."]
    assert {item.status for item in (text, sell, tell, done)} == {"completed"}


async def test_only_the_last_item_of_an_answer_at_its_limit_is_incomplete() -> None:
    *_, last = await events_of(
        TextPart("Sell."),
        ToolCallPart(0, "call_1", "sell", '{"si'),
        Finished("length", completion("", finish_reason="length")),
    )
    assert [item.status for item in last.response.output] == ["completed", "incomplete"]


async def test_parts_without_text_are_no_events() -> None:
    stream = await events_of(TextPart(""), ToolCallPart(0, "call_1", "sell", ""), END)
    assert [event.type for event in stream] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_an_event_shows_the_response_of_its_time() -> None:
    created, *_, completed = await events_of(TextPart("Sell."), END)
    assert (created.response.status, created.response.output) == ("in_progress", [])
    assert completed.response.status == "completed"
