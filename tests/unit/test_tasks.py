"""Tasks that outlive the request that starts them."""

from __future__ import annotations

import asyncio
import gc

import pytest

from llm_sidecar.tasks import TaskSet, all_of, first_success
from tests.unit.fakes import until


async def answer(gate: asyncio.Event, done: list[str]) -> str:
    await gate.wait()
    done.append("done")
    return "answer"


async def test_finish_returns_the_result() -> None:
    gate = asyncio.Event()
    gate.set()
    assert await TaskSet().finish(answer(gate, [])) == "answer"


async def test_finish_raises_the_error_of_the_work() -> None:
    async def fail() -> None:
        raise KeyError("odd")

    with pytest.raises(KeyError, match="odd"):
        await TaskSet().finish(fail())


async def test_the_work_goes_on_after_its_caller_is_cancelled() -> None:
    tasks, gate, done = TaskSet(), asyncio.Event(), list[str]()
    asking = asyncio.create_task(tasks.finish(answer(gate, done)))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert done == []
    gate.set()
    await until(lambda: done)
    assert done == ["done"]


async def test_join_waits_for_all_work_that_which_starts_meanwhile_included() -> None:
    tasks, gate, done = TaskSet(), asyncio.Event(), list[str]()

    async def first() -> None:
        await gate.wait()
        tasks.start(answer(gate, done))

    tasks.start(first())
    joining = asyncio.create_task(tasks.join())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not joining.done()
    gate.set()
    await joining
    assert done == ["done"]


async def test_join_returns_at_once_without_work() -> None:
    await TaskSet().join()


async def test_all_results_are_in_order() -> None:
    first, second, done = asyncio.Event(), asyncio.Event(), list[str]()

    async def number(gate: asyncio.Event, value: int, then: asyncio.Event) -> int:
        await gate.wait()
        done.append(str(value))
        then.set()
        return value

    second.set()
    works = [number(first, 1, second), number(second, 2, first)]
    assert await all_of(works) == [1, 2]
    assert done == ["2", "1"]


async def test_the_first_error_of_several_coroutines_cancels_the_others() -> None:
    ended = list[str]()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waiting")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("odd")

    with pytest.raises(KeyError, match="odd"):
        await all_of([wait(), fail()])
    assert ended == ["waiting"]


async def after(gate: asyncio.Event, result: str | Exception) -> str:
    await gate.wait()
    if isinstance(result, Exception):
        raise result
    return result


def is_set() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


async def test_the_first_success_is_the_result_and_the_others_are_cancelled() -> None:
    cancelled = []

    async def slow() -> str:
        try:
            return await after(asyncio.Event(), "slow")
        except asyncio.CancelledError:
            cancelled.append("slow")
            raise

    failed = after(is_set(), KeyError("odd"))
    assert await first_success(slow(), failed, after(is_set(), "quick")) == "quick"
    await until(lambda: cancelled)


async def test_a_failure_at_the_same_time_as_the_first_success_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    works = after(is_set(), "quick"), after(is_set(), KeyError("odd"))
    assert await first_success(*works) == "quick"
    gc.collect()
    assert caplog.messages == []


@pytest.mark.parametrize("count", [1, 2])
async def test_if_all_fail_the_error_is_that_of_the_first(count: int) -> None:
    works = [after(is_set(), KeyError(number)) for number in range(count)]
    with pytest.raises(KeyError, match="0"):
        await first_success(*works)


async def test_work_is_cancelled_with_who_waits_for_it() -> None:
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    waiting = asyncio.create_task(first_success(endless(), endless()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: len(ended) == 2)
