"""Time to first token of a stream over HTTP, compared with the engine's own."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import models
from benchmarks.models import THREADS
from benchmarks.table import Row
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from tests.live_server import LiveServer

_TOKENS: Final = proposals.MIN_COMPLETION_TOKENS


def first_token_over_http(rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, models.served(Path(folder)) as server:
        server.wait_until_ready()
        yield _first_token(server, rounds, "phi3", "phi3", _proposal)
        yield _first_token(server, rounds, "hermes", "llama", _chat)


def _first_token(
    server: LiveServer,
    rounds: int,
    model: str,
    architecture: models.Architecture,
    ask: Callable[[str], GenerationRequest],
) -> Row:
    engine = load_engine(models.onnx_model(architecture), device="cpu", threads=THREADS)
    seconds: dict[str, list[float]] = {"http": [], "engine": []}
    for number, prompt in enumerate(models.prompts(4 * rounds + 1)):
        both = {
            "http": _of_server(server, f"/generate/{model}/", prompt),
            "engine": _of_engine(engine, ask(prompt)),
        }
        for name, found in both.items():
            if number:  # the first one warms up
                seconds[name].append(found)
    quartiles = {
        name: statistics.quantiles([1000 * one for one in found], n=4)
        for name, found in seconds.items()
    }
    low, middle, _ = (
        http - own for http, own in zip(quartiles["http"], quartiles["engine"], strict=True)
    )
    return Row(
        f"first token of {model} over HTTP, beyond the engine's own",
        middle,
        30,
        f"medians of {len(seconds['http'])}: http {quartiles['http'][1]:.1f} ms, engine "
        f"{quartiles['engine'][1]:.1f} ms; {low:.1f} ms between the lower quartiles, which other "
        "load on the machine affects least",
        unit=" ms",
    )


def _proposal(prompt: str) -> GenerationRequest:
    return GenerationRequest(proposals.build_messages(prompt), _TOKENS, proposals.guidance(_TOKENS))


def _chat(prompt: str) -> GenerationRequest:
    return GenerationRequest(hermes_plugin.chat_messages(prompt), _TOKENS)


def _of_engine(engine: Engine, request: GenerationRequest) -> float:
    began = time.perf_counter()
    with contextlib.closing(engine.stream(request)) as deltas:
        for delta in deltas:
            if delta.text:
                break
    return time.perf_counter() - began


def _of_server(server: LiveServer, path: str, prompt: str) -> float:
    """Reads to the end, so that the next request does not overlap with this one."""
    accept = {"Accept": "text/event-stream"}
    first, began = 0.0, time.perf_counter()
    with server.client.stream(
        "POST", path, json={"prompt": prompt, "max_length": _TOKENS}, headers=accept
    ) as response:
        for chunk in response.iter_bytes():
            if not first and b"event: token" in chunk:
                first = time.perf_counter() - began
    return first
