"""Admission control: the maximum of running requests, and refusals while the server drains."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from osiris.middleware.admission import Admission
from osiris.shutdown import Shutdown
from tests.unit.asgi import Call, Inner, client, http_scope

ENDING = {"detail": "The server is shutting down; try again."}


class Held:
    """An app that waits before its answer, or in the middle of it.

    Attributes:
        go: lets it finish once it is set.
        inside: number of requests that it has started and not finished.
    """

    def __init__(self, *, answers_first: bool = False) -> None:
        self.go = asyncio.Event()
        self.inside = 0
        self._answers_first = answers_first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": []}
        if self._answers_first:
            await send(start)
        self.inside += 1
        try:
            await self.go.wait()
        finally:
            self.inside -= 1
        if not self._answers_first:
            await send(start)
        await send({"type": "http.response.body", "body": b"held"})


def shutdown() -> Shutdown:
    return Shutdown(grace=1.0, drain=0.0)


async def begin(app: Admission, path: str = "/generate/") -> tuple[asyncio.Task[None], Call]:
    call = Call()
    task = asyncio.create_task(app(http_scope(path), call.receive, call.send))
    await asyncio.sleep(0)
    return task, call


async def test_the_request_beyond_the_maximum_is_429() -> None:
    inner = Held()
    app = Admission(inner, 2, shutdown())
    first, _ = await begin(app)
    second, answered = await begin(app)
    assert inner.inside == 2
    async with client(app) as asking:
        refused = await asking.post("/generate/")
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json() == {
        "detail": "2 requests are running, which is MAX_CONCURRENT_REQUESTS; try again later."
    }
    inner.go.set()
    await asyncio.gather(first, second)
    assert (answered.status, answered.body) == (200, b"held")
    async with client(app) as asking:
        assert (await asking.post("/generate/")).status_code == 200


async def test_a_failed_request_frees_its_slot() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("broken")

    app = Admission(broken, 1, shutdown())
    for _ in range(2):
        with pytest.raises(KeyError):
            await app(http_scope("/generate/"), Call().receive, Call().send)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready/", "/metrics"])
async def test_probes_and_metrics_are_admitted_and_take_no_slot(path: str) -> None:
    inner = Held()
    ending = shutdown()
    app = Admission(inner, 1, ending)
    probe, _ = await begin(app, path)
    assert ending.running == 0
    full, _ = await begin(app)
    assert ending.running == 1
    again, _ = await begin(app, path)
    assert inner.inside == 3
    inner.go.set()
    await asyncio.gather(probe, full, again)


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_other_protocols_pass_without_admission(kind: str) -> None:
    inner = Inner()
    ending = shutdown()
    ending.draining = True
    call, scope = Call(), http_scope("/generate/", type=kind)
    await Admission(inner, 0, ending)(scope, call.receive, call.send)
    assert (inner.scopes, inner.receivers) == ([scope], [call.receive])
    assert call.headers == {}


@pytest.mark.parametrize("path", ["/health", "/generate/"])
async def test_an_admitted_request_keeps_its_scope_and_body(path: str) -> None:
    inner, call, scope = Inner(), Call(), http_scope(path)
    await Admission(inner, 1, shutdown())(scope, call.receive, call.send)
    assert (inner.scopes, inner.receivers) == ([scope], [call.receive])


# While the server drains


async def test_a_new_request_is_refused_while_the_server_drains() -> None:
    inner = Inner()
    ending = shutdown()
    ending.draining = True
    async with client(Admission(inner, 5, ending)) as asking:
        refused = await asking.post("/generate/", json={"prompt": "x"})
    assert refused.status_code == 503
    assert refused.json() == ENDING
    assert refused.headers["Retry-After"] == "5"
    assert inner.scopes == []


async def test_probes_are_answered_while_the_server_drains() -> None:
    ending = shutdown()
    ending.draining = True
    async with client(Admission(Inner(), 5, ending)) as asking:
        answer = await asking.get("/health/ready")
    assert (answer.status_code, answer.text) == (200, "inner")


async def test_a_refusal_leaves_the_body_to_the_transport() -> None:
    ending = shutdown()
    ending.draining = True
    body: Message = {"type": "http.request", "body": b"x", "more_body": False}
    call = Call(body)
    await Admission(Inner(), 5, ending)(http_scope("/speak"), call.receive, call.send)
    assert (call.status, json.loads(call.body)) == (503, ENDING)
    assert call.received == [body]


async def test_a_cancelled_request_is_answered_with_503() -> None:
    inner, ending = Held(), shutdown()
    task, call = await begin(Admission(inner, 5, ending))
    ending.draining = True
    task.cancel()
    await task
    assert (call.status, json.loads(call.body)) == (503, ENDING)
    assert call.headers["retry-after"] == "5"
    assert inner.inside == 0
    assert ending.running == 0


async def test_a_request_cancelled_during_its_answer_gets_no_second_one() -> None:
    inner, ending = Held(answers_first=True), shutdown()
    task, call = await begin(Admission(inner, 5, ending))
    ending.draining = True
    task.cancel()
    await task
    assert [message["type"] for message in call.sent] == ["http.response.start"]
    assert call.status == 200


@pytest.mark.parametrize("answers_first", [False, True])
async def test_a_cancellation_without_a_shutdown_is_passed_on(answers_first: bool) -> None:
    task, call = await begin(Admission(Held(answers_first=answers_first), 5, shutdown()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(call.sent) == answers_first


async def test_the_messages_of_a_stream_are_passed_on_unchanged() -> None:
    sent: list[Any] = [
        {"type": "http.response.start", "status": 206, "headers": [(b"x-part", b"1")]},
        {"type": "http.response.body", "body": b"one", "more_body": True},
        {"type": "http.response.body", "body": b"two"},
    ]

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        for message in sent:
            await send(message)

    call = Call()
    await Admission(stream, 5, shutdown())(http_scope("/stream/audio"), call.receive, call.send)
    assert call.sent == sent
