"""Tokens per second over HTTP: against `transformers serve`, and by threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import httpx

from benchmarks import models
from benchmarks.models import THREADS
from benchmarks.table import Row
from llm_sidecar import hermes_plugin
from tests.live_server import LiveServer, free_port

_WRITTEN: Final = 64
"""Tokens of each answer."""
_BUSY_SECONDS: Final = 4.0
_HELD_BACK: Final = (
    "0.321 on two whole cores of an EPYC with AVX-512; on hyperthreads, or without AVX-512, eight "
    "rows of int4 gain little over one; onnxruntime-genai, tried before, gave eight no more than "
    "one"
)


def against_transformers_serve(rounds: int) -> Iterator[Row]:
    source = models.transformers_model("llama").absolute()
    asked = models.prompts(8)
    with (
        tempfile.TemporaryDirectory() as folder,
        models.served(Path(folder, "int4")) as converted,
        models.served(Path(folder, "float32"), HERMES_MODEL_PATH=str(source)) as original,
        transformers_serve(source, Path(folder)) as theirs,
    ):
        for server in (converted, original):
            server.wait_until_ready()

        async def other(client: httpx.AsyncClient, prompt: str) -> int:
            body = {
                "model": str(source),
                "messages": hermes_plugin.chat_messages(prompt),
                "max_tokens": _WRITTEN,
                "temperature": 0.0,
            }
            answer = await client.post(f"{theirs}/v1/chat/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        sides = {"int4": _asking(converted), "float32": _asking(original), "theirs": other}
        for clients in (1, 8):
            speeds: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(min(rounds, 3) + 1):
                for name, ask in sides.items():
                    speed = asyncio.run(_tokens_per_second(ask, asked[:clients]))
                    if number:
                        speeds[name].append(speed)
            median = {name: statistics.median(found) for name, found in speeds.items()}
            for name, wanted in (("int4", 1 / 3), ("float32", None)):
                yield Row(
                    "tokens/s of `transformers serve --continuous-batching` on the float32 Llama "
                    f"against ours on its {name}, {clients} at once",
                    median["theirs"] / median[name],
                    wanted,
                    f"{median['theirs']:.0f} and {median[name]:.0f} tokens/s",
                    missed=_HELD_BACK,
                )


def _asking(server: LiveServer) -> Callable[[httpx.AsyncClient, str], Awaitable[int]]:
    async def ask(client: httpx.AsyncClient, prompt: str) -> int:
        body = {"prompt": prompt, "max_length": _WRITTEN}
        answer = await client.post(f"{server.url}/generate/hermes/", json=body)
        answer.raise_for_status()
        return int(answer.headers["X-Completion-Tokens"])

    return ask


async def _tokens_per_second(
    ask: Callable[[httpx.AsyncClient, str], Awaitable[int]], asked: Sequence[str]
) -> float:
    async with httpx.AsyncClient(timeout=300.0) as client:
        began = time.perf_counter()
        tokens = await asyncio.gather(*(ask(client, prompt) for prompt in asked))
        return sum(tokens) / (time.perf_counter() - began)


@contextlib.contextmanager
def transformers_serve(model: Path, folder: Path) -> Iterator[str]:
    """`transformers serve` with a model; its URL, without the `/v1`."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--continuous-batching", "--attn-implementation", "sdpa", "--device", "cpu"]
    command += ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HOME": str(folder),
    }
    written = folder / "transformers.log"
    with written.open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/v1/models", timeout=10.0)
                break
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(f"transformers serve: {written.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def threads_of_two_models(rounds: int) -> Iterator[Row]:
    cores = os.cpu_count() or 1
    counts = {"all": cores, "half": max(1, cores // 2)}
    asked = models.prompts(16)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(
                models.served(folder / name, PHI3_THREADS=str(count), HERMES_THREADS=str(count))
            )
            for name, count in counts.items()
        }
        for server in servers.values():
            server.wait_until_ready()
        paths = {"both": ("/generate/phi3/", "/generate/hermes/"), "one": ("/generate/hermes/",)}
        speeds: dict[tuple[str, str], list[float]] = {}
        for number in range(min(rounds, 4) + 1):
            for busy in paths:
                for name, server in servers.items():
                    speed = asyncio.run(_busy(server.url, paths[busy], asked))
                    if number:
                        speeds.setdefault((busy, name), []).append(speed)
    median = {key: statistics.median(found) for key, found in speeds.items()}
    for busy, what, wanted in (("both", "both models busy", 1.0), ("one", "one model busy", None)):
        yield Row(
            f"{what}: tokens/s with all cores for each, against half of them, which is the default",
            median[busy, "all"] / median[busy, "half"],
            wanted,
            f"{median[busy, 'all']:.0f} and {median[busy, 'half']:.0f} tokens/s",
        )


async def _busy(url: str, paths: Sequence[str], asked: Sequence[str]) -> float:
    """Completion tokens per second of one client for each path, over a few seconds."""
    tokens = 0
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:

        async def ask(path: str) -> None:
            nonlocal tokens
            for prompt in itertools.cycle(asked):
                body = {"prompt": prompt, "max_length": 256 if "phi3" in path else _WRITTEN}
                answer = await client.post(path, json=body)
                answer.raise_for_status()
                if time.perf_counter() - began > _BUSY_SECONDS:
                    return
                tokens += int(answer.headers["X-Completion-Tokens"])

        await asyncio.gather(*(ask(path) for path in paths))
    return tokens / _BUSY_SECONDS
