"""The transport's end: it discards what a client still sends, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from osiris.transport import WatchedTransport


class FakeTransport:
    """A transport that records how it ends.

    Attributes:
        calls: the names of the methods that were called, in order.
    """

    def __init__(self, *, half_closes: bool) -> None:
        self.calls: list[str] = []
        self._half_closes = half_closes

    def can_write_eof(self) -> bool:
        return self._half_closes

    def is_closing(self) -> bool:
        return "close" in self.calls

    def close(self) -> None:
        self.calls.append("close")

    def write_eof(self) -> None:
        self.calls.append("write_eof")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")


class FakeLoop:
    """An event loop without time.

    Attributes:
        timers: (seconds, callback) in the order in which they were set.
    """

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def call_later(self, seconds: float, callback: Callable[[], object]) -> object:
        self.timers.append((seconds, callback))
        return object()


def watch(fake: FakeTransport, *, sending: bool) -> tuple[WatchedTransport, FakeLoop]:
    loop = FakeLoop()
    made = WatchedTransport(
        cast(asyncio.Transport, fake),
        cast(Any, loop),
        5.0,
        still_sending=lambda: sending,
        on_stall=lambda: None,
    )
    return made, loop


def test_a_client_that_sends_nothing_is_closed_at_once() -> None:
    fake = FakeTransport(half_closes=True)
    watched, loop = watch(fake, sending=False)
    watched.close()
    assert (fake.calls, loop.timers) == (["close"], [])


@pytest.mark.parametrize(
    ("half_closes", "calls"),
    [(True, ["write_eof", "resume_reading"]), (False, ["resume_reading"])],
    ids=["TCP", "TLS"],
)
def test_a_client_that_is_still_sending_has_two_seconds(
    half_closes: bool, calls: list[str]
) -> None:
    fake = FakeTransport(half_closes=half_closes)
    watched, loop = watch(fake, sending=True)
    watched.close()
    assert fake.calls == calls
    assert watched.is_closing()
    ((seconds, callback),) = loop.timers
    assert seconds == 2.0
    callback()
    assert fake.calls == [*calls, "close"]


def test_a_mebibyte_is_discarded_and_no_more() -> None:
    fake = FakeTransport(half_closes=False)
    watched, _ = watch(fake, sending=True)
    watched.close()
    watched.discard((1 << 20) - 1)
    watched.discard(1)
    assert fake.calls == ["resume_reading"]
    watched.discard(1)
    assert fake.calls == ["resume_reading", "close"]


def test_closing_twice_is_closing_once() -> None:
    fake = FakeTransport(half_closes=True)
    watched, loop = watch(fake, sending=True)
    watched.close()
    watched.close()
    assert (fake.calls, len(loop.timers)) == (["write_eof", "resume_reading"], 1)
