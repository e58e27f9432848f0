"""Adapter swaps under load."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Final

import httpx
import numpy as np
import psutil

from benchmarks import models
from benchmarks.table import Row
from llm_sidecar.engines.lora_graph import ADAPTER_FILE, read_lora_graph
from llm_sidecar.engines.lora_graph import write_adapter as write_matrices
from llm_sidecar.models.files import DEMO_DIR
from llm_sidecar.models.lora import convert_adapter
from tests.live_server import LiveServer, serve
from tests.random_models import write_adapter

NAMES: Final = ("20260101", "20260102")
_SETTLED: Final = 10
"""Swaps after which memory is compared with that in the end."""
_PROMPTS: Final = 4
_USUAL_SECONDS: Final = 20.0
"""How long the clients ask without a swap, for comparison."""


def swapped_under_load(rounds: int) -> Iterator[Row]:
    del rounds
    yield from _of_large_models()
    yield from _of_the_demo()


def _of_large_models() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder, "adapters")
        for seed, name in enumerate(NAMES):
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
            load, memory = _Load(server, clients=8), _Memory(server)
            usual, swapping = load.longest_waits(swaps=40, after_each=memory.note)
    name = "40 adapter swaps under a load of 8 clients"
    yield Row(f"{name}: failed requests", load.failed, 0, f"of {load.answered}")
    yield Row(
        f"{name}: answers of neither adapter",
        load.others,
        0,
        f"of {load.answered}, by the beginning of their text",
    )
    yield Row(
        f"{name}: longest wait of a request, all eight queued, against that without swaps",
        swapping / usual,
        None,
        f"{swapping:.1f} and {usual:.1f} s; loading takes CPU time from those who ask",
    )
    after, settled = memory.megabytes[-1], memory.megabytes[_SETTLED - 1]
    yield Row(
        f"{name}: memory after the last, against that after the tenth",
        after / settled,
        1.05,
        f"{after:.0f} and {settled:.0f} MB of the server and Phi-3's worker",
    )


def _of_the_demo() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder, "adapters")
        projections = read_lora_graph(DEMO_DIR / "phi3" / "model.onnx").projections
        for seed, name in enumerate(NAMES):
            rng = np.random.default_rng(seed)
            matrices = {
                projection: tuple(
                    (0.2 * rng.normal(size=size)).astype(its.dtype)
                    for size in ((its.inputs, 8), (8, its.outputs))
                )
                for projection, its in projections.items()
            }
            (adapters / name).mkdir(parents=True)
            (adapters / name / "adapter_config.json").write_text("{}")
            write_matrices(adapters / name / ADAPTER_FILE, matrices)
        environ = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true"}
        with serve(Path(folder), PHI3_ADAPTER_DIR=str(adapters), **environ) as server:
            server.wait_until_ready()
            usual, swapping = _Load(server, clients=1).longest_waits(swaps=5)
    yield Row(
        "5 adapter swaps of the demo under one client: longest wait of a request, beyond the "
        "longest without swaps",
        max(0.0, swapping - usual),
        1.0,
        f"{swapping:.2f} and {usual:.2f} s",
        unit=" s",
    )


class _Memory:
    """The memory of the server and Phi-3's worker, in megabytes."""

    def __init__(self, server: LiveServer) -> None:
        self.megabytes: list[float] = []
        self._server = server

    def note(self) -> None:
        processes = (self._server.process.pid, self._server.worker("phi3"))
        taken = sum(psutil.Process(pid).memory_info().rss for pid in processes)
        self.megabytes.append(taken / 2**20)


class _Load:
    """Clients that send requests without a pause, and their answers."""

    def __init__(self, server: LiveServer, clients: int) -> None:
        """First collects the answers of each adapter alone."""
        self.failed = self.others = self.answered = 0
        self._server = server
        self._clients = clients
        asked = models.prompts(16)
        alone = [_answers(server, name, asked) for name in NAMES]
        beginnings = {
            prompt: _beginnings(*answers) for prompt, *answers in zip(asked, *alone, strict=True)
        }
        # The earlier the adapters differ, the less a batch can change.
        soonest = sorted(asked, key=lambda prompt: len(beginnings[prompt][0]))[:_PROMPTS]
        self._allowed = {prompt: beginnings[prompt] for prompt in soonest}
        self._waits: list[float] = []

    def longest_waits(
        self, swaps: int, after_each: Callable[[], None] = lambda: None
    ) -> tuple[float, float]:
        """The longest duration of a request in seconds: without swaps, and during this many
        swaps."""

        async def swap(client: httpx.AsyncClient) -> None:
            for number in range(swaps):
                body = {"adapter": NAMES[number % len(NAMES)]}
                (await client.post("/adapters/swap", json=body)).raise_for_status()
                after_each()

        usual = asyncio.run(self._longest_wait(lambda client: asyncio.sleep(_USUAL_SECONDS)))
        return usual, asyncio.run(self._longest_wait(swap))

    async def _longest_wait(
        self, work: Callable[[httpx.AsyncClient], Coroutine[None, None, None]]
    ) -> float:
        self._waits = []
        async with httpx.AsyncClient(base_url=self._server.url, timeout=120.0) as client:
            working = asyncio.create_task(work(client))
            asking = [self._ask(client, number, working) for number in range(self._clients)]
            await asyncio.gather(working, *asking)
        return max(self._waits)

    async def _ask(
        self, client: httpx.AsyncClient, number: int, working: asyncio.Task[None]
    ) -> None:
        prompts = list(self._allowed)
        while not working.done():
            prompt = prompts[(number + self.answered) % len(prompts)]
            began = time.monotonic()
            answer = await client.post("/generate/phi3/", json=_body(prompt))
            self._waits.append(time.monotonic() - began)
            self.answered += 1
            self.failed += answer.status_code != 200
            self.others += not answer.text.startswith(self._allowed[prompt])


def _beginnings(one: str, other: str) -> tuple[str, str]:
    """Both texts up to the first character that differs.

    Not the whole texts: the kernels round otherwise for a row alone than for rows in a batch, and
    random weights then go on with another word of equal probability.
    """
    same = next(end for end, (a, b) in enumerate(zip(one, other, strict=False), 1) if a != b)
    return one[:same], other[:same]


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
