"""Replicas of a model in real worker processes, whose engine repeats the prompt."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from llm_sidecar.engines import EngineOptions, GenerationRequest
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.models.base import Adapter, Delta
from llm_sidecar.models.files import ModelFiles
from llm_sidecar.models.local import process
from llm_sidecar.models.local.model import LocalModel
from tests.live_server import is_running

CLIENTS = 8
REQUESTS = 100


class Replicated:
    """Two replicas, and adapters for them.

    Attributes:
        model: the model.
        adapters: folders that every replica loads.
        on_ready: is called when a worker begins to serve.
    """

    def __init__(self, folder: Path) -> None:
        self.adapters = [Adapter(folder / name) for name in ("20260101", "20260102")]
        for adapter in self.adapters:
            adapter.folder.mkdir()
        self.on_ready: Callable[[], None] = lambda: None
        self.model = LocalModel(
            "phi3",
            lambda: ModelFiles("phi3/fake", folder),
            options=EngineOptions("cpu"),
            replicas=2,
            preload=True,
            on_ready=lambda: self.on_ready(),
        )

    def states(self) -> list[str]:
        return [replica.state for replica in self.model.status().replicas]

    def pids(self) -> list[int | None]:
        return [replica.pid for replica in self.model.status().replicas]

    async def until_ready(self) -> None:
        await until(lambda: self.states() == ["ready", "ready"])


@pytest.fixture
async def replicated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replicated]:
    monkeypatch.setattr(process, "_PROGRAM", "tests.fake_worker")
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    made = Replicated(tmp_path)
    await made.model.start()
    await made.until_ready()
    yield made
    await made.model.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def asked(number: int) -> GenerationRequest:
    words = " ".join(f"{number}-{word}" for word in range(20))
    return GenerationRequest([{"role": "user", "content": words}], 50)


async def answers(
    model: LocalModel, after: Callable[[int], None] = lambda count: None
) -> list[list[Delta]]:
    """The deltas of all requests, in order, by a few clients; every text is checked.

    Args:
        after: called with the number of answers so far, after each.
    """
    found: dict[int, list[Delta]] = {}
    numbers = iter(range(REQUESTS))

    async def client() -> None:
        for number in numbers:
            request = asked(number)
            found[number] = [delta async for delta in model.stream(request)]
            text = "".join(delta.text for delta in found[number])
            assert text.split() == request.messages[0]["content"].split()
            after(len(found))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [found[number] for number in range(REQUESTS)]


async def test_no_request_fails_while_a_replica_is_killed(replicated: Replicated) -> None:
    first, second = replicated.pids()
    assert first is not None

    def kill(count: int) -> None:
        if count == REQUESTS // 4:
            os.kill(first, signal.SIGKILL)

    await answers(replicated.model, kill)
    await replicated.until_ready()
    assert replicated.model.status().restarts == 1
    assert second in replicated.pids()
    assert first not in replicated.pids()


async def test_both_replicas_answer(replicated: Replicated) -> None:
    await answers(replicated.model)
    shown = replicated.model.status()
    assert (shown.requests, shown.running) == (0, 0)
    assert shown.completion_tokens_total == 20 * REQUESTS


async def test_a_swap_under_load_fails_no_request_and_mixes_no_adapters(
    replicated: Replicated,
) -> None:
    swaps: list[asyncio.Task[None]] = []
    one, other = replicated.adapters

    async def swap_twice() -> None:
        for adapter in (one, other):
            await replicated.model.use_adapter(adapter)

    def begin(count: int) -> None:
        if count == CLIENTS:
            swaps.append(asyncio.create_task(swap_twice()))

    found = await answers(replicated.model, begin)
    (swapping,) = swaps
    while not swapping.done():
        found += await answers(replicated.model)
    await swapping
    adapters = [{delta.adapter for delta in deltas} for deltas in found]
    assert {len(names) for names in adapters} == {1}
    assert set.union(*adapters) == {None, "20260101", "20260102"}
    assert [one.adapter for one in replicated.model.status().replicas] == ["20260102"] * 2


async def test_an_adapter_that_only_the_first_replica_loads_is_given_up(
    replicated: Replicated,
) -> None:
    adapter, _ = replicated.adapters
    _, second = replicated.pids()
    replicated.on_ready = lambda: shutil.rmtree(adapter.folder, ignore_errors=True)
    with pytest.raises(AdapterRejected, match="20260101 is refused"):
        await replicated.model.use_adapter(adapter)
    assert [one.adapter for one in replicated.model.status().replicas] == [None, None]
    (deltas, *_) = await answers(replicated.model)
    assert deltas[0].adapter is None
    await replicated.until_ready()
    assert replicated.pids()[1] == second
    assert replicated.model.status().adapter is None


async def test_closing_ends_all_workers(replicated: Replicated) -> None:
    pids = replicated.pids()
    await replicated.model.close()
    assert [pid is not None and is_running(pid) for pid in pids] == [False, False]
