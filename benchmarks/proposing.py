"""Guided proposals over HTTP: one, against a loop without a server, and sixteen at once, also on
several replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import onnxruntime_genai as og

from benchmarks import models
from benchmarks.capacity import all_loaded
from benchmarks.models import THREADS
from benchmarks.table import Row
from llm_sidecar import proposals
from tests.live_server import LiveServer


class Bare:
    """The loop that a program with onnxruntime-genai alone would write.

    Args:
        reuse: whether it rewinds one generator, and appends forced tokens at once.
    """

    def __init__(self, model: Any, *, reuse: bool) -> None:
        self._model = model
        self._tokenizer = og.Tokenizer(model)
        self._reuse = reuse
        self._generator: Any = None
        self._tokens: list[int] = []

    def propose(self, messages: Sequence[dict[str, str]]) -> str:
        text = self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        tokens = self._tokenizer.encode(text).tolist()
        shared = 0
        if self._generator is None or not self._reuse:
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=2048, do_sample=False)
            params.set_guidance("json_schema", proposals.GUIDANCE, self._reuse)
            self._generator = og.Generator(self._model, params)
        else:
            while tokens[shared] == self._tokens[shared]:
                shared += 1
            self._generator.rewind_to(shared)
        self._generator.append_tokens(tokens[shared:])
        self._tokens = tokens
        while not self._generator.is_done():
            self._generator.generate_next_token()
        written: str = self._tokenizer.decode(self._generator.get_sequence(0)[len(tokens) :])
        return written.removesuffix("<|end|>")


def proposals_over_http(rounds: int) -> Iterator[Row]:
    model = _bare_model(models.onnx_model("phi3"))
    with tempfile.TemporaryDirectory() as folder, models.served(Path(folder)) as server:
        shots = _correct(server, 3)
        reuse, plain = Bare(model, reuse=True), Bare(model, reuse=False)
        sides: dict[str, Callable[[str], str]] = {
            "http": lambda prompt: _proposal(server, prompt),
            "bare": lambda prompt: reuse.propose(proposals.build_messages(prompt, shots)),
            "plain": lambda prompt: plain.propose(proposals.build_messages(prompt, shots)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number, prompt in enumerate(models.prompts(rounds + 1)):
            for name, side in sides.items():
                began = time.perf_counter()
                # They may differ: each side splits forced text into tokens in its own way.
                json.loads(side(prompt))
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    detail = ", ".join(f"{name} {1000 * time:.0f} ms" for name, time in median.items())
    name = "guided proposal over HTTP, three examples, against a bare loop"
    yield Row(
        f"{name} with prefix reuse and forced tokens", median["http"] / median["bare"], 1.10, detail
    )
    yield Row(f"{name} without", median["http"] / median["plain"], 0.5, detail)


def _bare_model(folder: Path) -> Any:
    config = og.Config(str(folder))
    session = {"intra_op_num_threads": THREADS, "session.intra_op.allow_spinning": "0"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return og.Model(config)


def _proposal(server: LiveServer, prompt: str) -> str:
    answer = server.client.post("/generate/phi3/", json={"prompt": prompt, "max_length": 256})
    answer.raise_for_status()
    return answer.text


def _correct(server: LiveServer, count: int) -> list[proposals.Example]:
    """Sends corrections to the server, and returns its few-shot examples."""
    server.wait_until_ready()
    server.wait_until_database_is_open()
    shots = models.examples(count)
    for shot in shots:
        answer = server.client.post(
            "/propose_trade_adjustments/", json={"prompt": shot.prompt, "max_length": 256}
        )
        answer.raise_for_status()
        server.client.post(
            "/feedback/phi3/",
            json={
                "transaction_id": answer.json()["transaction_id"],
                "feedback_type": "correction",
                "feedback_content": "so",
                "corrected_proposal": shot.proposal,
            },
        ).raise_for_status()
    return shots


def sixteen_at_once(rounds: int) -> Iterator[Row]:
    del rounds
    with tempfile.TemporaryDirectory() as folder, models.served(Path(folder)) as server:
        server.wait_until_ready()
        asked = models.prompts(17)
        _proposal(server, asked.pop())
        sequential, concurrent = [], []
        for _ in range(5):
            began = time.perf_counter()
            for prompt in asked:
                _proposal(server, prompt)
            sequential.append(time.perf_counter() - began)
            seconds, _ = asyncio.run(_concurrently(server.url, asked, probed=False))
            concurrent.append(seconds)
        _, probes = asyncio.run(_concurrently(server.url, asked, probed=True))
    percentile = statistics.quantiles(probes, n=100)[98]
    name = "sixteen proposals at once"
    yield Row(
        f"{name}, against one after the other",
        statistics.median(concurrent) / statistics.median(sequential),
        1.05,
        f"{statistics.median(concurrent):.1f} s and {statistics.median(sequential):.1f} s",
    )
    yield Row(
        f"{name}: 99th percentile of `/health` meanwhile",
        1000 * percentile,
        20,
        f"{len(probes)} probes",
        unit=" ms",
    )


def sixteen_on_replicas(rounds: int) -> Iterator[Row]:
    """Each worker has the default number of threads: on two cores one."""
    one = {"PHI3_REPLICAS": "1", "PHI3_THREADS": "", "HERMES_THREADS": ""}
    sides = {"one": one, "phi3": one | {"PHI3_REPLICAS": "2"}}
    sides["both"] = sides["phi3"] | {"HERMES_REPLICAS": "2"}
    alone, whole = "/generate/phi3/", "/propose_trade_adjustments/"
    seconds: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(models.served(folder / name, **environ))
            for name, environ in sides.items()
        }
        for server in servers.values():
            server.wait_until(lambda server=server: all_loaded(server), seconds=300, interval=0.2)
        for number in range(min(rounds, 5) + 1):
            asked = models.prompts(16)
            for path, name in itertools.product((alone, whole), servers):
                url = servers[name].url
                took, _ = asyncio.run(_concurrently(url, asked, probed=False, path=path))
                if number:
                    seconds.setdefault((path, name), []).append(took)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    what, critique = "sixteen proposals at once", ", with critique and score"
    for path, name, text, wanted in (
        (alone, "phi3", f"{what}: time with PHI3_REPLICAS=2", 0.9),
        (whole, "both", f"{what}{critique}: time with two replicas of both models", 0.9),
        (whole, "phi3", f"{what}{critique}: time with PHI3_REPLICAS=2 alone", None),
    ):
        yield Row(
            f"{text}, of that with one",
            median[path, name] / median[path, "one"],
            wanted,
            f"{median[path, name]:.1f} s and {median[path, 'one']:.1f} s; one thread a worker",
        )


async def _concurrently(
    url: str, asked: Sequence[str], *, probed: bool, path: str = "/generate/phi3/"
) -> tuple[float, list[float]]:
    """Seconds for all requests, and for each probe of `/health` meanwhile."""
    probes: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:

        async def one(prompt: str) -> None:
            body = {"prompt": prompt, "max_length": 256}
            (await client.post(path, json=body)).raise_for_status()

        async def probe() -> None:
            while True:
                began = time.perf_counter()
                (await client.get("/health")).raise_for_status()
                probes.append(time.perf_counter() - began)
                await asyncio.sleep(0.005)

        probing = asyncio.create_task(probe()) if probed else None
        began = time.perf_counter()
        await asyncio.gather(*map(one, asked))
        seconds = time.perf_counter() - began
        if probing is not None:
            probing.cancel()
    return seconds, probes
