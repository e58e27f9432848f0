"""How many requests replicas of a model serve on a machine, and how much memory they take.

    python -m benchmarks.capacity plan MODEL --threads 1 --cores 16

measures the engine of a model on this machine and simulates 1, 2, 4 and 8 replicas;

    python -m benchmarks.capacity memory --replicas 1 2 4

measures the memory of a server of the configured models, or of the demo models;

    python -m benchmarks.capacity check

compares the simulation with real servers, whose workers take a fixed time for each token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.load import NUMBER, rate, request
from benchmarks.simulation import Machine, Replica, Workload, limit, simulate
from benchmarks.table import processor
from llm_sidecar.engines import EngineOptions, GenerationRequest, Message, load_engine
from tests.live_server import LiveServer, serve

COUNTS: Final = (1, 2, 4, 8)
TOKENS: Final = 60
STEP_SECONDS: Final = 0.02
_CLIENTS: Final = 4
"""For each replica."""
_REQUESTS: Final = 20
"""For each replica."""
_ALLOWED: Final = 0.15
_STEPS: Final = 24
"""Decode steps that are measured."""
_ARRAY: Final = '{"type":"array","minItems":100,"items":{"type":"integer"}}'
_PROMPT: Final = "Desk holds ABC LONG from 104.2, now 108.9; the stop is at 101.5. " * 3


@dataclass(frozen=True)
class Compared:
    """Requests per second of a real server with some replicas, and of the simulation."""

    replicas: int
    real: float
    simulated: float

    @property
    def error(self) -> float:
        """How far the simulation is from the real server, as a share of that."""
        return self.simulated / self.real - 1


def check() -> Iterator[Compared]:
    """Compares the simulation with real servers.

    Its inputs are measured apart: the CPU time of the API process on a server whose workers take no
    time, and the duration of a sleep.
    """
    machine, replica = _fake_machine(), Replica(1.0, (_step_seconds(),), threads=0)
    for count in COUNTS:
        workload = Workload(_CLIENTS * count, requests=_REQUESTS * count, completion_tokens=TOKENS)
        with fake_server(count, STEP_SECONDS) as server:
            real = _rate(server, workload)
        yield Compared(count, real, simulate(workload, replica, machine, count).per_second)


@contextlib.contextmanager
def fake_server(replicas: int, step_seconds: float) -> Iterator[LiveServer]:
    """A server with this number of replicas of Hermes, all loaded. Each serves one request at a
    time, and repeats the prompt."""
    environ = {
        "SIDECAR_DEMO": "true",
        "PRELOAD_MODELS": "true",
        "HERMES_REPLICAS": str(replicas),
        "FAKE_CAPACITY": "1",
        "FAKE_STEP_SECONDS": str(step_seconds),
        "LOG_FORMAT": "json",
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), "--no-access-log", app="tests.fake_app:app", **environ) as server,
    ):
        server.wait_until(lambda: all_loaded(server), interval=0.2)
        yield server


def all_loaded(server: LiveServer) -> bool:
    """Whether all replicas of both models are ready."""
    models = server.client.get("/health").json()["models"].values()
    return all(one["state"] == "ready" for model in models for one in (model, *model["replicas"]))


def _rate(server: LiveServer, workload: Workload) -> float:
    words = " ".join([NUMBER, *["word"] * (workload.completion_tokens - 1)])
    body = b'{"prompt": "%s", "max_length": %d}' % (words.encode(), workload.completion_tokens)
    message = request("POST", "/generate/hermes/", body)
    return rate(server.url, message, connections=workload.clients, requests=workload.requests)


def _fake_machine() -> Machine:
    """The work of the API process, from its CPU time for short and for long answers."""
    with fake_server(1, 0.0) as server:
        seconds = {}
        for tokens in (1, TOKENS):
            _rate(server, Workload(_CLIENTS, requests=100, completion_tokens=tokens))
            before = _cpu_seconds(server.process.pid)
            _rate(server, Workload(_CLIENTS, requests=400, completion_tokens=tokens))
            seconds[tokens] = (_cpu_seconds(server.process.pid) - before) / 400
    return Machine(
        cores=1,
        api_request=seconds[1],
        # With no time between them, several tokens of an answer travel together.
        api_token=max(0.0, seconds[TOKENS] - seconds[1]) / (TOKENS - 1),
    )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _step_seconds() -> float:
    """How long a sleep of `STEP_SECONDS` really is."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        time.sleep(STEP_SECONDS)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(model: Path, threads: int) -> Replica:
    """The speed of a model's engine, alone on this machine."""
    engine: Any = load_engine(model, **asdict(EngineOptions("cpu", threads)))
    asked = _array(0)
    tokens = engine.tokenize(asked)
    began = time.perf_counter()
    for _ in engine.prefill(replace(asked, tokens=tokens)):
        pass
    prefill = len(tokens) / (time.perf_counter() - began)
    sizes = range(1, engine.batch().capacity + 1)
    return Replica(prefill, tuple(_step_of(engine, size) for size in sizes), threads)


def _step_of(engine: Any, size: int) -> float:
    """Seconds of a decode step with a batch of this size."""
    batch, begun = engine.batch(), set[int]()
    for number in range(size):
        batch.add(number, _array(number))
    while len(begun) < size:
        begun |= {number for number, delta in batch.step() if delta.completion_tokens}
    times = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        batch.step()
        times.append(time.perf_counter() - began)
    for number in range(size):
        batch.remove(number)
    return statistics.median(times)


def _array(number: int) -> GenerationRequest:
    """A request whose answer does not end soon; each number begins differently."""
    turn: Message = {"role": "user", "content": f"{number}: {_PROMPT}"}
    return GenerationRequest([turn], 240, _ARRAY, logprobs=0)


def memory(replicas: int) -> tuple[float, list[float]]:
    """MB of the API process, and of each worker with Phi-3, after sixteen proposals at once."""
    environ = {
        name: os.environ.get(name, "")
        for name in ("MICRO_LLM_MODEL_PATH", "HERMES_MODEL_PATH", "PHI3_THREADS")
    }
    environ |= {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true", "PHI3_REPLICAS": str(replicas)}
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), "--no-access-log", **environ) as server,
    ):
        server.wait_until(lambda: all_loaded(server), seconds=600, interval=0.2)
        body = json.dumps({"prompt": f"{NUMBER} {_PROMPT}"}).encode()
        rate(server.url, request("POST", "/generate/phi3/", body), connections=16, requests=16)
        phi3 = server.client.get("/health").json()["models"]["phi3"]
        pids = [one["pid"] for one in phi3["replicas"] or [phi3]]
        return _megabytes(server.process.pid), [_megabytes(pid) for pid in pids]


def _megabytes(pid: int) -> float:
    """The proportional set size: pages that several processes share count in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes * 1024 / 1e6


def _print_check(options: argparse.Namespace) -> int:
    print("| replicas | requests/s | simulated | error |\n|---|---|---|---|")
    worst = 0.0
    for row in check():
        worst = max(worst, abs(row.error))
        print(
            f"| {row.replicas} | {row.real:.2f} | {row.simulated:.2f} | {row.error:+.1%} |",
            flush=True,
        )
    return int(worst > _ALLOWED)


def _print_plan(options: argparse.Namespace) -> int:
    replica = measure(options.model, options.threads)
    steps = ", ".join(f"{1000 * seconds:.1f}" for seconds in replica.steps)
    print(
        f"{processor()}; {options.threads} threads: prefill {replica.prefill:.0f} tokens/s; ms of a"
    )
    print(f"step with 1 to {replica.capacity} requests: {steps}\n")
    machine = Machine(options.cores, options.api_request, options.api_token)
    workload = Workload(
        options.clients,
        requests=20 * options.clients,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
    )
    print(
        "| replicas | at most | requests/s | median s | 99th percentile s |\n|---|---|---|---|---|"
    )
    for count in COUNTS:
        found = simulate(workload, replica, machine, count)
        most = limit(workload, replica, machine, count)
        times = f"{found.percentile(50):.2f} | {found.percentile(99):.2f}"
        print(f"| {count} | {most:.2f} | {found.per_second:.2f} | {times} |")
    return 0


def _print_memory(options: argparse.Namespace) -> int:
    print("| replicas | API process | each worker with Phi-3 |\n|---|---|---|")
    for count in options.replicas:
        api, workers = memory(count)
        print(f"| {count} | {api:.0f} MB | {', '.join(f'{one:.0f}' for one in workers)} MB |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    commands.add_parser("check", help="against real servers").set_defaults(run=_print_check)
    plan = commands.add_parser("plan", help="for a model")
    plan.set_defaults(run=_print_plan)
    plan.add_argument("model", type=Path, help="a folder, or a .gguf file")
    plan.add_argument("--threads", type=int, default=1, help="of each replica")
    plan.add_argument("--cores", type=int, default=os.cpu_count(), help="for all replicas")
    plan.add_argument("--clients", type=int, default=16, help="that ask at once")
    plan.add_argument("--prompt-tokens", type=int, default=64, help="that are not cached")
    plan.add_argument("--completion-tokens", type=int, default=TOKENS)
    plan.add_argument("--api-request", type=float, default=0.0, help="seconds of the API process")
    plan.add_argument("--api-token", type=float, default=0.0, help="seconds of the API process")
    of_memory = commands.add_parser("memory", help="of Phi-3's workers")
    of_memory.set_defaults(run=_print_memory)
    of_memory.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    result: int = options.run(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
