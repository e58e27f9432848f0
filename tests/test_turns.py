"""Turns: their order, their number, and being alone."""

from __future__ import annotations

import asyncio
import random

import pytest

from llm_sidecar.turns import Turns


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Visitors:
    """Tasks that take a turn and keep it until they are told to go."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.inside: list[str] = []
        self._ways_out: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def _visit(self, name: str, alone: bool) -> None:
        async with self.turns.alone() if alone else self.turns:
            self.inside.append(name)
            try:
                await self._ways_out[name].wait()
            finally:
                self.inside.remove(name)

    async def come(self, *names: str, alone: bool = False) -> None:
        for name in names:
            self._ways_out[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._visit(name, alone))
        await settle()

    async def go(self, name: str) -> None:
        self._ways_out[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()
        with pytest.raises(asyncio.CancelledError):
            await self._tasks[name]


async def test_one_at_a_time_in_order_and_more_once_there_is_room() -> None:
    visitors = Visitors(Turns())
    await visitors.come("a", "b", "c", "d", "e")
    assert visitors.inside == ["a"]
    await visitors.go("a")
    assert visitors.inside == ["b"]
    visitors.turns.widen(3)
    await settle()
    assert visitors.inside == ["b", "c", "d"]
    visitors.turns.widen(1)
    await visitors.go("c")
    assert visitors.inside == ["b", "d", "e"]


async def test_whoever_must_be_alone_goes_before_those_that_wait() -> None:
    visitors = Visitors(Turns())
    visitors.turns.widen(2)
    await visitors.come("a", "b", "c")
    await visitors.come("lonely", alone=True)
    await visitors.go("a")
    assert visitors.inside == ["b"]
    await visitors.go("b")
    assert visitors.inside == ["lonely"]
    await visitors.come("d")
    assert visitors.inside == ["lonely"]
    await visitors.go("lonely")
    assert visitors.inside == ["c", "d"]


async def test_who_gives_up_waiting_holds_up_nobody() -> None:
    visitors = Visitors(Turns())
    await visitors.come("a", "b", "c")
    await visitors.cancel("b")
    await visitors.come("lonely", alone=True)
    await visitors.cancel("lonely")
    await visitors.go("a")
    assert visitors.inside == ["c"]
    await visitors.cancel("c")
    await visitors.come("d")
    assert visitors.inside == ["d"]


async def test_a_turn_that_comes_as_its_task_is_cancelled_is_passed_on() -> None:
    turns = Turns()
    await turns.__aenter__()
    waiting = asyncio.create_task(turns.__aenter__())
    await settle()
    await turns.__aexit__()
    # Its turn has come, and it has not run since.
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    async with asyncio.timeout(1), turns:
        pass


async def test_no_turn_is_lost_or_given_twice() -> None:
    rng, turns = random.Random(3), Turns()
    turns.widen(3)
    inside = most = 0
    lonely = False

    async def visit(alone: bool) -> None:
        nonlocal inside, most, lonely
        async with turns.alone() if alone else turns:
            assert not lonely
            assert not (alone and inside)
            lonely = alone
            inside += 1
            most = max(most, inside)
            try:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1
                lonely = False

    tasks = []
    lock = asyncio.Lock()

    async def alone() -> None:
        async with lock:
            await visit(alone=True)

    for _ in range(400):
        tasks.append(asyncio.create_task(alone() if rng.random() < 0.1 else visit(alone=False)))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(one) for one in ended} <= {type(None), asyncio.CancelledError}
    assert most == 3
    async with asyncio.timeout(1), turns.alone():
        pass
