"""Adapters that are swapped while clients ask."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks import models
from benchmarks.table import Row
from llm_sidecar.lora import convert_adapter
from tests.live_server import LiveServer
from tests.random_models import write_adapter

CLIENTS: Final = 8
SWAPS: Final = 40
_SETTLED: Final = 10
"""Swaps after which memory is compared with that in the end."""
_USUAL_SECONDS: Final = 20.0
"""How long the clients ask without a swap, for comparison."""


def swapped_under_load(rounds: int) -> Iterator[Row]:
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder, "adapters")
        names = ("20260101", "20260102")
        for seed, name in enumerate(names):
            peft = write_adapter(
                models.transformers_model("phi3"),
                Path(folder, f"peft-{name}"),
                seed,
                r=8,
                target_modules="all-linear",
            )
            convert_adapter(peft, models.onnx_model("phi3"), adapters / name)
        with models.served(Path(folder), PHI3_ADAPTER_DIR=str(adapters)) as server:
            server.wait_until_ready()
            asked = models.prompts(4)
            alone = {name: _answers(server, name, asked) for name in names}
            assert all(one != other for one, other in zip(*alone.values(), strict=True))
            allowed = {
                prompt: {answers[index] for answers in alone.values()}
                for index, prompt in enumerate(asked)
            }
            load = _Load(server, allowed)
            usual = asyncio.run(load.longest_wait(lambda client: asyncio.sleep(_USUAL_SECONDS)))
            memory: list[float] = []

            async def swap(client: httpx.AsyncClient) -> None:
                for number in range(SWAPS):
                    body = {"adapter": names[number % len(names)]}
                    (await client.post("/adapters/swap", json=body)).raise_for_status()
                    memory.append(_megabytes(server))

            swapping = asyncio.run(load.longest_wait(swap))
    name = f"{SWAPS} adapter swaps under a load of {CLIENTS} clients"
    yield Row(f"{name}: failed requests", load.failed, 0, f"of {load.answered}")
    yield Row(
        f"{name}: answers of neither adapter",
        load.others,
        0,
        f"of {load.answered}, by their text",
    )
    yield Row(
        f"{name}: longest wait of a request, beyond the longest without swaps",
        max(0.0, swapping - usual),
        1.0,
        f"{swapping:.2f} and {usual:.2f} s",
        unit=" s",
    )
    after, settled = memory[-1], memory[_SETTLED - 1]
    yield Row(
        f"{name}: memory after the last, against that after the tenth",
        after / settled,
        1.05,
        f"{after:.0f} and {settled:.0f} MB of the server and Phi-3's worker",
    )


def _megabytes(server: LiveServer) -> float:
    processes = (server.process.pid, server.worker("phi3"))
    return sum(psutil.Process(pid).memory_info().rss for pid in processes) / 2**20


def _answers(server: LiveServer, adapter: str, asked: list[str]) -> list[str]:
    server.client.post("/adapters/swap", json={"adapter": adapter}).raise_for_status()
    answers = []
    for prompt in asked:
        answer = server.client.post("/generate/phi3/", json=_body(prompt))
        answer.raise_for_status()
        answers.append(answer.text)
    return answers


def _body(prompt: str) -> dict[str, str | int]:
    return {"prompt": prompt, "max_length": 256}


@dataclass
class _Load:
    """Clients that ask without a pause, and what they got.

    Attributes:
        allowed: the answers that there may be, by prompt.
    """

    server: LiveServer
    allowed: dict[str, set[str]]
    failed: int = 0
    others: int = 0
    answered: int = 0
    _waits: list[float] = field(default_factory=list)

    async def longest_wait(
        self, work: Callable[[httpx.AsyncClient], Coroutine[None, None, None]]
    ) -> float:
        """Has them ask for as long as `work` takes; the most seconds that a request took."""
        self._waits = []
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120.0) as client:
            working = asyncio.create_task(work(client))
            asking = [self._ask(client, number, working) for number in range(CLIENTS)]
            await asyncio.gather(working, *asking)
        return max(self._waits)

    async def _ask(
        self, client: httpx.AsyncClient, number: int, working: asyncio.Task[None]
    ) -> None:
        prompts = list(self.allowed)
        while not working.done():
            prompt = prompts[(number + self.answered) % len(prompts)]
            began = time.monotonic()
            answer = await client.post("/generate/phi3/", json=_body(prompt))
            self._waits.append(time.monotonic() - began)
            self.answered += 1
            self.failed += answer.status_code != 200
            self.others += answer.text not in self.allowed[prompt]
