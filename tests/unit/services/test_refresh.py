"""Refreshes on request and periodically, and while the database is unavailable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.services import refresh as module
from llm_sidecar.services.refresh import Refresher
from tests.unit.fakes import until


class Made:
    """A refresher of something.

    Attributes:
        reads: how many there have been.
        failures: to raise, one a read; the first is for the next.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.failures: list[Exception] = []
        self.refresher = Refresher("the weather", self._read)

    async def _read(self) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.reads += 1


@pytest.fixture
async def made(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    for name in ("_PAUSE", "_RETRY_PAUSE"):
        monkeypatch.setattr(module, name, 0.0)
    made = Made()
    yield made
    await made.refresher.close()


async def test_the_first_read_comes_with_the_start(made: Made) -> None:
    assert made.reads == 0
    made.refresher.start()
    await until(lambda: made.reads == 1)


async def test_what_other_processes_write_is_read_after_half_a_minute(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: float = module.REFRESH_SECONDS
    assert seconds == 30.0
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    made.refresher.start()
    await until(lambda: made.reads == 3)


async def test_the_time_between_reads_may_change(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE", 0.0)
    seconds = [60.0]
    made.refresher = Refresher("the weather", made._read, lambda: seconds[0])
    made.refresher.start()
    for _ in range(20):
        await asyncio.sleep(0)
    assert made.reads == 1
    seconds[0] = 0.0
    await until(lambda: made.reads == 2)


async def test_it_is_read_again_soon_once_for_many_requests(made: Made) -> None:
    made.refresher.start()
    await until(lambda: made.reads == 1)
    for _ in range(9):
        made.refresher.soon()
    await until(lambda: made.reads == 2)
    for _ in range(100):
        await asyncio.sleep(0)
    assert made.reads == 2


async def test_a_burst_is_read_once_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    never = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await never.wait()

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        made = Made()
        made.refresher.start()
        await until_without_sleep(lambda: pauses)
        await made.refresher.close()
    assert (pauses, made.reads) == ([0.5], 1)


async def until_without_sleep(condition: Callable[[], object]) -> None:
    """As `until`, while `asyncio.sleep` is replaced."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        while not condition():
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await turn


@pytest.mark.parametrize(
    ("failure", "logged"),
    [
        (DatabaseUnavailable("It is away."), "the weather cannot be refreshed: It is away."),
        (ValueError("odd"), "the weather cannot be refreshed"),
    ],
)
async def test_after_a_failure_it_is_tried_again(
    made: Made, caplog: pytest.LogCaptureFixture, failure: Exception, logged: str
) -> None:
    made.failures = [failure]
    made.refresher.start()
    await until(lambda: made.reads)
    assert caplog.messages == [logged]


async def test_the_same_failure_is_logged_once(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.failures = [DatabaseUnavailable(reason) for reason in ("one", "one", "other", "one")]
    made.refresher.start()
    await until(lambda: made.reads)
    assert [message.rpartition(": ")[2] for message in caplog.messages] == ["one", "other", "one"]


async def test_a_failure_that_comes_back_is_logged_again(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.failures = [DatabaseUnavailable("one")]
    made.refresher.start()
    await until(lambda: made.reads == 1)
    made.failures = [DatabaseUnavailable("one")]
    made.refresher.soon()
    await until(lambda: made.reads == 2)
    assert caplog.messages == ["the weather cannot be refreshed: one"] * 2


async def test_nothing_is_read_after_it_is_closed(made: Made) -> None:
    made.refresher.start()
    await until(lambda: made.reads == 1)
    await made.refresher.close()
    made.refresher.soon()
    for _ in range(100):
        await asyncio.sleep(0)
    assert made.reads == 1
