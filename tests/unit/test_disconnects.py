"""Work that is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message

from osiris.disconnects import cancel_on_disconnect
from tests.unit.asgi import http_scope


class Client:
    """A client that disconnects when a test says so.

    Attributes:
        disconnected: set once it has disconnected.
    """

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()

    async def receive(self) -> Message:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    @property
    def request(self) -> Request:
        return Request(http_scope("/generate/"), self.receive)


async def test_the_result_of_the_work_is_returned() -> None:
    async def work() -> str:
        return "done"

    assert await cancel_on_disconnect(Client().request, work()) == "done"


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        await cancel_on_disconnect(Client().request, work())


async def test_a_disconnect_cancels_the_work() -> None:
    client, started, cancelled = Client(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(cancel_on_disconnect(client.request, work()))
    await started.wait()
    client.disconnected.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert cancelled.is_set()


async def test_a_cancelled_request_cancels_the_work() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(cancel_on_disconnect(Client().request, work()))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cancelled.is_set()
