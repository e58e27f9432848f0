"""The time limit for a server that sends nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.silence import Silent, silence_limit

SECONDS = 0.01


class Busy:
    """A connection that has always just received something for another request.

    Attributes:
        checked: set when it has been looked at three times.
    """

    def __init__(self) -> None:
        self.checked = asyncio.Event()
        self._looks = 0

    @property
    def last_byte(self) -> float:
        self._looks += 1
        if self._looks == 3:
            self.checked.set()
        return time.monotonic()


class Quiet:
    """A connection that has received nothing for long."""

    last_byte = 0.0


def connection(fake: Any) -> Connection:
    return cast(Connection, fake)


async def test_a_server_that_sends_nothing_ends_the_request() -> None:
    with pytest.raises(Silent) as caught:
        async with asyncio.timeout(10), silence_limit(connection(Quiet()), SECONDS):
            await asyncio.Event().wait()
    assert caught.value.seconds == SECONDS


async def test_a_request_waits_while_the_server_answers_others() -> None:
    busy = Busy()
    async with asyncio.timeout(10), silence_limit(connection(busy), SECONDS):
        await busy.checked.wait()


async def test_without_a_limit_nothing_is_checked() -> None:
    busy = Busy()
    async with silence_limit(connection(busy), None):
        await asyncio.sleep(0)
    assert not busy.checked.is_set()


async def test_the_deadline_of_the_request_is_no_silence() -> None:
    with pytest.raises(TimeoutError):
        async with silence_limit(connection(Quiet()), 60.0), asyncio.timeout(0):
            await asyncio.Event().wait()
