"""Server-sent events of one request: their order, their end, and a client that reads slowly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request
from sse_starlette import ServerSentEvent
from starlette.requests import ClientDisconnect

from llm_sidecar.errors import ModelUnavailable, QueueFull
from osiris import event_stream as module
from osiris.event_stream import event_stream, wants_events
from tests.unit.asgi import Reader, events_in, http_scope
from tests.unit.fakes import until

SCOPE = http_scope("/generate/")


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ([], False),
        (["*/*"], False),
        (["application/json"], False),
        (["text/*"], False),
        (["text/event-stream"], True),
        (["Text/Event-Stream; charset=utf-8"], True),
        (["application/json, text/event-stream"], True),
        (["application/json", "text/event-stream"], True),
        (["text/event-stream, */*"], True),
        (["text/event-stream;q=0.5, application/json;q=0.4"], True),
        (["text/event-stream;q=0.5, application/json"], False),
        (["text/event-stream;q=0.5, application/*;q=0.6, */*;q=0.1"], False),
        (["text/event-stream;q=0.5, application/json;q=0.1, */*;q=0.9"], True),
        (["text/event-stream; q=0"], False),
        (["text/event-stream;q=0.0, */*;q=0"], False),
        (["text/event-stream;q=much"], False),
        (["text/event-stream;q=nan"], False),
        (["text/event-stream-of-mine"], False),
        (["", ";q=1", "text/event-stream ;q=1.000"], True),
    ],
)
def test_a_client_gets_events_if_it_names_them_and_prefers_nothing_else(
    accept: list[str], wanted: bool
) -> None:
    headers = [(b"accept", value.encode()) for value in accept]
    assert wants_events(Request(http_scope("/generate/", headers=headers))) is wanted


class Events:
    """Events with the numbers from 0.

    Attributes:
        begun, made, closed: how many generators have begun, events been made, generators ended.
        resumed: lets the generators go on after `pause` events.
    """

    def __init__(
        self, count: int, error: BaseException | None = None, pause: int | None = None
    ) -> None:
        self.begun = self.made = self.closed = 0
        self.resumed = asyncio.Event()
        self._count, self._error, self._pause = count, error, pause

    async def __call__(self) -> AsyncGenerator[ServerSentEvent, None]:
        self.begun += 1
        try:
            for number in range(self._count):
                if number == self._pause:
                    await self.resumed.wait()
                self.made += 1
                yield ServerSentEvent(str(number), event="number")
            if self._error is not None:
                raise self._error
        finally:
            self.closed += 1


def failed(error: Exception) -> ServerSentEvent:
    return ServerSentEvent(f'"{error}"', event="failed")


async def serve(events: Events, reader: Reader, headers: dict[str, str] | None = None) -> None:
    """Responds as a route does."""
    request = Request(SCOPE, reader.receive)
    await request.body()
    response = await event_stream(request, events(), failed, headers)
    await response(SCOPE, reader.receive, reader.send)


def numbers(count: int) -> list[tuple[str, Any]]:
    return [("number", number) for number in range(count)]


async def test_the_events_are_sent_in_order_and_the_response_ends() -> None:
    events, reader = Events(100), Reader()
    await serve(events, reader, {"X-Mine": "1"})
    start, *_ = reader.sent
    assert start["status"] == 200
    assert dict(start["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-store",
        b"x-accel-buffering": b"no",
        b"x-mine": b"1",
    }
    assert events_in(reader.body) == numbers(100)
    assert reader.has_all
    assert events.closed == 1


async def test_an_event_is_sent_as_soon_as_it_is_there() -> None:
    events, reader = Events(2, pause=1), Reader()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: events_in(reader.body) == numbers(1))
    assert not reader.has_all
    events.resumed.set()
    await serving
    assert events_in(reader.body) == numbers(2)


async def test_a_stream_without_events_is_empty() -> None:
    reader = Reader()
    await serve(Events(0), reader)
    assert reader.body == b""
    assert reader.has_all


async def test_an_error_before_the_first_event_is_raised_before_the_response_starts() -> None:
    error, reader = QueueFull("The queue is full."), Reader()
    events = Events(0, error)
    with pytest.raises(QueueFull) as caught:
        await serve(events, reader)
    assert caught.value is error
    assert reader.sent == []


async def test_a_response_starts_with_a_comment_if_the_first_event_is_late(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_FIRST_EVENT", 0.0)
    events, reader = Events(1, ModelUnavailable("phi3 is gone."), pause=0), Reader()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: reader.body == b": ping\r\n\r\n")
    events.resumed.set()
    await serving
    assert events_in(reader.body) == [*numbers(1), ("failed", "phi3 is gone.")]


async def test_comments_keep_a_silent_stream_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_ALIVE", 0.0)
    events, reader = Events(2, pause=1), Reader()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: reader.body.count(b": ping\r\n\r\n") > 1)
    events.resumed.set()
    await serving
    assert events_in(reader.body) == numbers(2)


async def test_an_error_of_ours_is_the_last_event_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader = Reader()
    await serve(Events(3, ModelUnavailable("phi3 is gone.")), reader)
    assert events_in(reader.body) == [*numbers(3), ("failed", "phi3 is gone.")]
    assert reader.has_all
    assert caplog.messages == ["the request failed: phi3 is gone."]


async def test_an_unexpected_error_ends_the_response_and_is_raised_again() -> None:
    error, reader = KeyError("a defect"), Reader()
    with pytest.raises(KeyError) as caught:
        await serve(Events(1, error), reader)
    assert caught.value is error
    assert events_in(reader.body.replace(b"'", b"")) == [*numbers(1), ("failed", "a defect")]
    assert reader.has_all


async def test_a_cancellation_from_elsewhere_is_an_unexpected_error() -> None:
    reader = Reader()
    with pytest.raises(RuntimeError, match="the generation was cancelled before the end"):
        await serve(Events(1, asyncio.CancelledError()), reader)
    assert [name for name, _ in events_in(reader.body)] == ["number", "failed"]


async def test_a_client_that_reads_nothing_stops_the_generation_after_a_few_events() -> None:
    events, reader = Events(1000), Reader()
    reader.reads.clear()
    serving = asyncio.create_task(serve(events, reader))
    for _ in range(200):
        await asyncio.sleep(0)
    # One is being sent, sixteen are queued, and one waits for the queue.
    assert events.made == 18
    reader.reads.set()
    await serving
    assert events_in(reader.body) == numbers(1000)


# Early ends


def begun(reader: Reader) -> bool:
    return events_in(reader.body) == numbers(1)


@pytest.mark.parametrize("pause", [0, 1])
async def test_a_disconnect_cancels_the_generation(
    pause: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    events, reader = Events(2, pause=pause), Reader()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: begun(reader) if pause else events.begun)
    reader.disconnected.set()
    if pause:
        await serving
        assert caplog.messages == ["the client disconnected; its stream was cancelled"]
    else:
        # The app handles it.
        with pytest.raises(ClientDisconnect):
            await serving
    assert events.closed == 1
    assert events_in(reader.body) == numbers(pause)


async def test_a_client_that_disconnects_without_reading_cancels_the_generation() -> None:
    events, reader = Events(1000), Reader()
    reader.reads.clear()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: events.made == 18)
    reader.disconnected.set()
    await serving
    assert (events.made, events.closed, reader.sent) == (18, 1, [])


async def test_a_shutdown_is_the_last_event() -> None:
    events, reader = Events(2, pause=1), Reader()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: begun(reader))
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    ending = ("failed", "The server is shutting down; try again.")
    assert events_in(reader.body) == [*numbers(1), ending]
    assert reader.has_all
    assert events.closed == 1


async def test_a_shutdown_does_not_wait_for_a_client_that_reads_nothing() -> None:
    events, reader = Events(1000), Reader()
    reader.reads.clear()
    serving = asyncio.create_task(serve(events, reader))
    await until(lambda: events.made == 18)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert (events.closed, reader.sent) == (1, [])


@pytest.mark.parametrize("end", ["disconnect", "cancel", "both"])
@pytest.mark.parametrize("count", [0, 3, 40])
async def test_whenever_a_stream_ends_nothing_of_it_stays(end: str, count: int) -> None:
    before = asyncio.all_tasks()
    for steps in range(60):
        events, reader = Events(count), Reader()
        serving = asyncio.create_task(serve(events, reader))
        for _ in range(steps):
            await asyncio.sleep(0)
        if end != "cancel":
            reader.disconnected.set()
        if end != "disconnect":
            serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert events.closed == events.begun, steps
        assert asyncio.all_tasks() == before, steps
