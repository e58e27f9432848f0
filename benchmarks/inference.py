"""How fast models answer: `make bench` writes benchmarks/RESULTS.md.

Each row is a ratio whose two sides ran in turns in this run, on models of about 100 million random
weights unless it says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import httpx
import onnxruntime_genai as og

from benchmarks import adapters, models
from benchmarks.models import THREADS
from benchmarks.table import Row, machine
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.demo import market
from llm_sidecar.engines import Engine, GenerationRequest, load_engine
from tests.live_server import LiveServer, free_port, serve

RESULTS: Final = Path(__file__).with_name("RESULTS.md")
_RNG: Final = Random(7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(MEASURES), default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=8, help="in which both sides take turns")
    options = parser.parse_args()
    lines = [*machine(), "", "| what | reached | wanted | how |", "|---|---|---|---|"]
    for line in lines:
        print(line)
    for name in options.only:
        for row in MEASURES[name](options.rounds):
            lines.append(str(row))
            print(row, flush=True)
    if options.only == list(MEASURES):
        RESULTS.write_text("\n".join(["# Results of `make bench`", "", *lines]) + "\n")


def examples(count: int) -> list[proposals.Example]:
    cases = [market.draw(_RNG, "train", 300) for _ in range(count)]
    return [proposals.Example(case.prompt, case.proposal) for case in cases]


def _median(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f} ms"


# 1. A guided proposal over HTTP


class Bare:
    """The loop that a program with onnxruntime-genai alone would write.

    Args:
        reuse: whether it keeps one generator and rewinds it, and has forced tokens written at once.
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
            answers = {}
            for name, side in sides.items():
                began = time.perf_counter()
                answers[name] = json.loads(side(prompt))
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
            # The plain loop splits text into other tokens than forced ones, and may end otherwise.
            assert answers["http"] == answers["bare"], answers
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
    """Gives the server corrections, and returns the examples that it makes of them."""
    server.wait_until_ready()
    server.wait_until_database_is_open()
    shots = examples(count)
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


# 2. and 4. Prefixes and scores, in the engine


def first_token(rounds: int) -> Iterator[Row]:
    engine = load_engine(models.onnx_model("phi3"), device="cpu", threads=THREADS)
    cold, warm = [], []
    shots: list[proposals.Example] = []
    tokens = 0
    while tokens < 600:
        shots += examples(1)
        tokens = len(engine.next_token(proposals.build_messages("", shots)[:-1])[0])
    for number, prompt in enumerate(models.prompts(rounds + 1)):
        # Other examples, so that nothing of them is known yet.
        unknown = proposals.Example(f"{number}", shots[0].proposal)
        cold.append(_until_first(engine, proposals.build_messages(prompt, [unknown, *shots])))
        again = proposals.build_messages(prompt + " Now?", [unknown, *shots])
        _until_first(engine, again)
        short = proposals.build_messages("Long ABC?", [unknown, *shots])
        warm.append(_until_first(engine, short))
    ratio = statistics.median(warm[1:]) / statistics.median(cold[1:])
    detail = f"{_median(warm[1:])}, cold {_median(cold[1:])}"
    yield Row(
        f"time to first token after a shared prefix of {tokens} tokens, against a cold one",
        ratio,
        0.1,
        detail,
    )


def _until_first(engine: Engine, messages: list[dict[str, str]]) -> float:
    began = time.perf_counter()
    for delta in engine.stream(GenerationRequest(messages, 8, proposals.GUIDANCE)):
        if delta.completion_tokens:
            break
    return time.perf_counter() - began


def one_score(rounds: int) -> Iterator[Row]:
    engine = load_engine(models.onnx_model("llama"), device="cpu", threads=THREADS)
    seconds: dict[str, list[float]] = {"score": [], "answer": [], "cold score": []}
    differences = []
    for prompt in models.prompts(rounds + 1):
        proposal = market.draw(_RNG, "train").proposal
        score = hermes_plugin.build_messages(hermes_plugin.SCORE_TASK, proposal, prompt)
        with _timed(seconds["cold score"]):
            first = engine.answer_probabilities(score, hermes_plugin.SCORE_ANSWERS)
        critique = hermes_plugin.build_messages(hermes_plugin.CRITIQUE_TASK, proposal, prompt)
        # As in the service: the proposal has just been criticised.
        _write(engine, critique, 30)
        with _timed(seconds["score"]):
            again = engine.answer_probabilities(score, hermes_plugin.SCORE_ANSWERS)
        differences.append(
            abs(hermes_plugin.expected_score(first) - hermes_plugin.expected_score(again))
        )
        _write(engine, critique, 30)
        with _timed(seconds["answer"]):
            _write(engine, score, 10)
    times = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    detail = ", ".join(f"{name} {_median(found[1:])}" for name, found in seconds.items())
    yield Row(
        "one score after its critique, against an answer of ten tokens there",
        times["score"] / times["answer"],
        0.6,
        detail,
    )
    yield Row("one score, greatest difference on repeat", max(differences), 1e-6, "9 scores")


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def _write(engine: Engine, messages: list[dict[str, str]], tokens: int) -> None:
    for _ in engine.stream(GenerationRequest(messages, tokens)):
        pass


# 3. The server that one would use otherwise


_WRITTEN: Final = 64
"""Tokens of each answer."""
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
        _transformers_serve(source, Path(folder)) as theirs,
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
def _transformers_serve(model: Path, folder: Path) -> Iterator[str]:
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


# 5. Sixteen at once


def sixteen_at_once(rounds: int) -> Iterator[Row]:
    del rounds
    with tempfile.TemporaryDirectory() as folder, models.served(Path(folder)) as server:
        server.wait_until_ready()
        asked = models.prompts(17)
        _proposal(server, asked.pop())
        alone, together = [], []
        for _ in range(5):
            began = time.perf_counter()
            for prompt in asked:
                _proposal(server, prompt)
            alone.append(time.perf_counter() - began)
            seconds, order, _ = asyncio.run(_together(server.url, asked, probed=False))
            together.append(seconds)
        _, _, probes = asyncio.run(_together(server.url, asked, probed=True))
    percentile = statistics.quantiles(probes, n=100)[98]
    name = "sixteen proposals at once"
    yield Row(
        f"{name}, against one after the other",
        statistics.median(together) / statistics.median(alone),
        1.05,
        f"{statistics.median(together):.1f} s and {statistics.median(alone):.1f} s",
    )
    yield Row(
        f"{name}: 99th percentile of `/health` meanwhile",
        1000 * percentile,
        20,
        f"{len(probes)} probes",
        unit=" ms",
    )
    late = sum(one > other for one, other in itertools.pairwise(order))
    yield Row(f"{name}: served out of order", late, 0, "by the time of their answers")


async def _together(
    url: str, asked: Sequence[str], *, probed: bool
) -> tuple[float, list[int], list[float]]:
    order: list[int] = []
    probes: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:

        async def one(number: int, prompt: str) -> None:
            body = {"prompt": prompt, "max_length": 256}
            (await client.post("/generate/phi3/", json=body)).raise_for_status()
            order.append(number)

        async def probe() -> None:
            while True:
                began = time.perf_counter()
                (await client.get("/health")).raise_for_status()
                probes.append(time.perf_counter() - began)
                await asyncio.sleep(0.005)

        probing = asyncio.create_task(probe()) if probed else None
        began = time.perf_counter()
        tasks = []
        for number, prompt in enumerate(asked):
            tasks.append(asyncio.create_task(one(number, prompt)))
            # So that they come in this order.
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        if probing is not None:
            probing.cancel()
    return seconds, order, probes


# Threads


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


_BUSY_SECONDS: Final = 4.0


# 7. Memory and start


def memory_and_start(rounds: int) -> Iterator[Row]:
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        everything = {
            "SIDECAR_DEMO": "true",
            "PRELOAD_MODELS": "true",
            "ENABLE_METRICS": "true",
            "SIDECAR_API_KEYS": "a-key-for-the-benchmark",
        }
        with serve(Path(folder), **everything) as server:
            server.client.headers["X-API-Key"] = everything["SIDECAR_API_KEYS"]
            body = {"prompt": models.prompts(1)[0]}
            server.wait_until(
                lambda: server.client.post("/generate/phi3/", json=body).status_code == 200
            )
            first = time.perf_counter() - began
            server.wait_until_ready()
            server.wait_until_database_is_open()
            for path, sent in (
                ("/propose_trade_adjustments/", body),
                ("/generate/hermes/", body),
                ("/speak", {"text": "Stop moved."}),
                (
                    "/feedback/phi3/",
                    {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"},
                ),
            ):
                server.client.post(path, json=sent).raise_for_status()
            server.client.get("/metrics").raise_for_status()
            status = Path(f"/proc/{server.process.pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    yield Row(
        "resident memory of the API process, every part in use",
        int(resident) / 1024,
        200,
        "demo models",
        unit=" MB",
        missed="90 MB are its own; the rest is code of libraries in the page cache, lancedb's 60 "
        "MB of it, and how much of that is mapped depends on how the cache holds it (14 MB more or "
        "less for two copies on one machine); letting go of code that only the start ran saves 25 "
        "MB, and leaving out the REST client that lancedb imports 13; another memory pool of "
        "Arrow's saved 4, fewer arenas of malloc's and a trim of its heap none",
    )
    yield Row(
        "from the start of the server to the first proposal", first, 6, "demo models", unit=" s"
    )


MEASURES: Final[dict[str, Callable[[int], Iterator[Row]]]] = {
    "proposals": proposals_over_http,
    "prefix": first_token,
    "score": one_score,
    "transformers": against_transformers_serve,
    "sixteen": sixteen_at_once,
    "threads": threads_of_two_models,
    "adapters": adapters.swapped_under_load,
    "start": memory_and_start,
}


if __name__ == "__main__":
    main()
