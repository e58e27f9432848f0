"""The errors for failures of servers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    QueueFull,
    SidecarError,
)
from llm_sidecar.models.base import RefusedRequest
from llm_sidecar.models.local.load_state import ModelLimits
from tests.completions import complete
from tests.unit.fakes import until
from tests.unit.remote.openai_server import (
    OpenAIServer,
    Stream,
    chunk,
    events,
)
from tests.unit.remote.samples import (
    ASK,
    FINE,
    Make,
    answer,
    server_of,
)

SAID = {"error": {"message": "You said: Hold ABC?", "type": "x"}}


@pytest.mark.parametrize(
    ("refused", "kind", "detail", "wait"),
    [
        (
            answer(429, SAID, Retry_After="7"),
            QueueFull,
            "The hermes server a is full; try again in 7 s.",
            7,
        ),
        (answer(429), QueueFull, "The hermes server a is full; try again in 1 s.", 1),
        (
            answer(503, SAID, Retry_After="12"),
            ModelUnavailable,
            "The hermes server a is not available now (503).",
            12,
        ),
        (
            answer(500, SAID),
            ModelUnavailable,
            "The hermes server a answers with status 500; its log says why.",
            5,
        ),
        (
            answer(401, SAID),
            ModelUnavailable,
            "The hermes server a refuses the API key (401); set the key of the server.",
            5,
        ),
        (
            answer(413, SAID),
            RefusedRequest,
            "The hermes server a refuses this request (413); its log says why.",
            None,
        ),
        (
            answer(422, SAID),
            RefusedRequest,
            "The hermes server a refuses this request (422); its log says why.",
            None,
        ),
        (
            Stream(events({"error": {"code": 400, "message": "Hold ABC?"}})),
            RefusedRequest,
            "The hermes server a refuses this request (400); its log says why.",
            None,
        ),
        (
            Stream(events(chunk("Fi"), chunk("", "content_filter"))),
            RefusedRequest,
            "The hermes server a refuses this request (400); its log says why.",
            None,
        ),
        (
            answer(302, None, Location="http://elsewhere/v1"),
            ModelUnavailable,
            "The hermes server a redirects (302), which the sidecar does not follow; set the "
            "final URL.",
            5,
        ),
        (
            answer(400, {"error": {"code": "context_length_exceeded"}}),
            InvalidRequest,
            "prompt: it is too long for the context of the model on the server",
            None,
        ),
        (
            answer(400, SAID),
            RefusedRequest,
            "The hermes server a refuses this request (400); its log says why.",
            None,
        ),
        (
            httpx.ReadError("Hold ABC?"),
            ModelUnavailable,
            "The hermes server a broke off (ReadError); try again.",
            1,
        ),
        (
            httpx.ConnectError("no route"),
            ModelUnavailable,
            "The hermes server a cannot be reached (ConnectError); start it, or correct its URL.",
            5,
        ),
        (
            Stream(events(chunk("Fi"))[:1]),
            ModelUnavailable,
            "The hermes server a ended its answer before it was complete; try again.",
            1,
        ),
        (
            Stream([*events(chunk("Fi"))[:1], httpx.ReadError("gone")]),
            ModelUnavailable,
            "The hermes server a broke off (ReadError); try again.",
            1,
        ),
        (
            Stream(events(chunk("Fi"), {"error": {"code": 429, "message": "Hold ABC?"}})),
            QueueFull,
            "The hermes server a is full; try again in 1 s.",
            1,
        ),
        (
            Stream(events({"error": "Hold ABC?"})),
            ModelUnavailable,
            "The hermes server a answers with status 500; its log says why.",
            5,
        ),
        (
            Stream(events({"error": {"type": "invalid_request_error", "code": "invalid_value"}})),
            RefusedRequest,
            "The hermes server a refuses this request (400); its log says why.",
            None,
        ),
        (
            Stream(events({"error": {"type": "invalid_request_error", "code": "model_not_found"}})),
            ModelUnavailable,
            "The hermes server a has no such path or model (404); the URL usually ends with /v1.",
            5,
        ),
        (
            Stream(events(chunk("Fi"), {"error": {"type": "rate_limit_exceeded", "code": None}})),
            QueueFull,
            "The hermes server a is full; try again in 1 s.",
            1,
        ),
        (
            Stream(events({"error": {"type": "x", "code": "context_length_exceeded"}})),
            ModelUnavailable,
            "The hermes server a answers with status 500; its log says why.",
            5,
        ),
        (
            # A list that is nested too deeply for a recursive function.
            Stream([b'data: {"error": {"code": 429, "x": ' + b"[" * 900 + b"]" * 900 + b"}}\n\n"]),
            QueueFull,
            "The hermes server a is full; try again in 1 s.",
            1,
        ),
        (
            answer(503, SAID, Retry_After="1 Jan 99999999999 00:00:00"),
            ModelUnavailable,
            "The hermes server a is not available now (503).",
            5,
        ),
        (
            Stream([b"data: {Hold ABC?\n\n"]),
            ModelUnavailable,
            "The hermes server a sends an answer that cannot be read (not an object of the "
            "protocol); try again.",
            1,
        ),
        (
            Stream([b"data: " + b"[" * 100_000 + b"\n\n"]),
            ModelUnavailable,
            "The hermes server a sends an answer that cannot be read (not an object of the "
            "protocol); try again.",
            1,
        ),
        (
            Stream(events(chunk("Fi", "abort"))),
            ModelUnavailable,
            "The hermes server a sends an answer that cannot be read (the server gave the "
            "completion up); try again.",
            1,
        ),
        (
            Stream([b" " * (1 << 18)] * 5),
            ModelUnavailable,
            "The hermes server a sends too many bytes; try again.",
            1,
        ),
    ],
)
async def test_each_failure_has_its_error(
    make: Make,
    caplog: pytest.LogCaptureFixture,
    refused: Any,
    kind: type[SidecarError],
    detail: str,
    wait: int | None,
) -> None:
    model = make(a=OpenAIServer(refused, refused))
    with pytest.raises(kind) as caught:
        await complete(model, ASK)
    assert (caught.value.detail, caught.value.retry_after) == (detail, wait)
    # Neither the error nor the log quotes what a server says.
    assert "Hold" not in caplog.text
    status = model.status()
    assert (status.requests, status.running, server_of(model).outstanding) == (0, 0, 0)


async def test_a_line_is_bounded(make: Make) -> None:
    model = make(a=OpenAIServer(Stream([b"x" * (1 << 19)] * 3)))
    with pytest.raises(ModelUnavailable, match="sends an event that is too long"):
        await complete(model, replace(ASK, max_tokens=8000))


async def test_an_answer_is_bounded_whatever_the_request_allows(make: Make) -> None:
    piece = events(chunk("x" * (1 << 19)))[0]
    model = make(a=OpenAIServer(Stream([piece] * 65)))
    with pytest.raises(ModelUnavailable, match="sends too many bytes"):
        await complete(model, replace(ASK, max_tokens=(1 << 31) - 1))


async def test_retry_after_may_be_a_date(make: Make) -> None:
    past = answer(503, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT")
    with pytest.raises(ModelUnavailable) as caught:
        await complete(make(a=OpenAIServer(past)), ASK)
    assert caught.value.retry_after == 1


async def test_a_deadline_that_has_passed_says_what_took_the_time(make: Make) -> None:
    model = make(a=OpenAIServer(Stream(FINE)))
    await complete(model, ASK)
    with pytest.raises(DeadlineExceeded, match=r"^hermes did not answer within 0 s: "):
        await complete(model, ASK, Deadline.after(0.0))


async def test_free_text_may_end_at_the_deadline(make: Make) -> None:
    stream = Stream([*events(chunk("Fi"))[:1], TimeoutError()])
    completion = await complete(
        make(a=OpenAIServer(stream)), ASK, Deadline.after(20), allow_partial=True
    )
    assert (completion.text, completion.finish_reason) == ("Fi", "deadline")


async def test_a_closed_stream_closes_the_connection(make: Make) -> None:
    stream = Stream(FINE)
    model = make(a=OpenAIServer(stream))
    async with aclosing(model.stream(ASK)) as deltas:
        async for _ in deltas:
            break
    assert stream.closed
    assert server_of(model).outstanding == 0


async def test_the_queue_is_bounded(make: Make) -> None:
    server = OpenAIServer(Stream(FINE))
    model = make(a=server, options={"limits": ModelLimits(queue_length=1)})
    async with aclosing(model.stream(ASK)) as first:
        await anext(first)
        with pytest.raises(QueueFull, match=r"^The hermes queue is full; "):
            await complete(model, ASK)


async def test_a_request_that_waits_for_the_first_contact_does_not_hold_up_the_shutdown(
    make: Make,
) -> None:
    server = OpenAIServer()
    server.is_silent = True
    model = make(a=server)
    await model.start()
    waiting = asyncio.create_task(complete(model, ASK))
    await until(lambda: model.status().requests)
    model.drain()
    with pytest.raises(ModelUnavailable, match="shutting down") as caught:
        async with asyncio.timeout(10):
            await waiting
    assert caught.value.retry_after == 5


async def test_a_model_that_drains_finishes_what_it_can(make: Make) -> None:
    model = make(a=OpenAIServer(Stream(FINE), Stream(FINE)))
    await complete(model, ASK)
    model.drain()
    assert (await complete(model, ASK)).text == "Fine."


async def test_a_closed_model_refuses(make: Make) -> None:
    model = make(a=OpenAIServer())
    await model.close()
    with pytest.raises(ModelUnavailable, match="shutting down"):
        await complete(model, ASK)
