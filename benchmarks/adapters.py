"""Adapters that are swapped while clients ask."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
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
SWAPS: Final = 200
_SETTLED: Final = 10
"""Swaps after which memory is compared with that in the end."""


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
            memory, failed, others, answered = asyncio.run(_swap(server, names, allowed))
    name = f"{SWAPS} adapter swaps under a load of {CLIENTS} clients"
    yield Row(f"{name}: failed requests", failed, 0, f"of {answered}")
    yield Row(f"{name}: answers of neither adapter", others, 0, f"of {answered}, by their text")
    after, settled = memory[-1], memory[_SETTLED - 1]
    yield Row(
        f"{name}: memory after the last, against that after the tenth",
        after / settled,
        1.05,
        f"{after:.0f} and {settled:.0f} MB of Phi-3's worker",
    )


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


async def _swap(
    server: LiveServer, names: tuple[str, ...], allowed: dict[str, set[str]]
) -> tuple[list[float], int, int, int]:
    """Megabytes after each swap; failed requests, wrong answers, and all of them."""
    failed = others = answered = 0
    done = False

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        nonlocal failed, others, answered
        prompts = list(allowed)
        while not done:
            prompt = prompts[(number + answered) % len(prompts)]
            answer = await client.post("/generate/phi3/", json=_body(prompt))
            answered += 1
            failed += answer.status_code != 200
            others += answer.text not in allowed[prompt]

    memory = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        asking = [asyncio.create_task(ask(client, number)) for number in range(CLIENTS)]
        for number in range(SWAPS):
            body = {"adapter": names[number % len(names)]}
            (await client.post("/adapters/swap", json=body)).raise_for_status()
            worker = server.client.get("/health").json()["models"]["phi3"]["pid"]
            memory.append(psutil.Process(worker).memory_info().rss / 2**20)
        done = True
        await asyncio.gather(*asking)
    return memory, failed, others, answered
