"""SmolLM2-135M-Instruct on our engines and on llama.cpp: `make bench-real` writes
benchmarks/RESULTS-real.md.

Each side runs in a process of its own with the same number of threads, and all take turns. Ratios
are of medians of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import psutil

from benchmarks import models, real_models
from llm_sidecar import hermes_plugin, proposals
from llm_sidecar.engines.gbnf import to_gbnf
from llm_sidecar.models.base import Message

RESULTS: Final = Path(__file__).with_name("RESULTS-real.md")
NODE_FOLDER: Final = Path(".data/node-llama-cpp")
THREADS: Final = (1, 2)
_WORDS: Final = (
    *("market", "price", "volume", "the", "of", "rises", "falls", "position", "trend", "and"),
    *(
        "support",
        "risk",
        "target",
        "above",
        "below",
        "week",
        "earnings",
        "strong",
        "weak",
        "spread",
    ),
)
_RNG: Final = Random(5)


class Missing(Exception):
    """A side that cannot run here; the message says why."""


class Agent:
    """The process of one side, see `real_agent`.

    Attributes:
        idle: MB of its process before the model is loaded.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Starts it."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()
        self.idle = self.memory()

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            Missing: the side failed; says how.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def memory(self) -> float:
        """The resident memory of the process and of those that it has started, in MB."""
        process = psutil.Process(self._process.pid)
        processes = [process, *process.children(recursive=True)]
        return float(sum(each.memory_info().rss for each in processes) / 1e6)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise Missing(answer["error"])
        return answer


@dataclass(frozen=True)
class Side:
    """An engine with a model.

    Attributes:
        command: starts its agent, for a number of threads; raises Missing.
    """

    name: str
    command: Callable[[int], list[str]]


def _ours(folder: Callable[[], Path], **options: object) -> Callable[[int], list[str]]:
    def command(threads: int) -> list[str]:
        given = {"folder": str(folder().absolute()), "threads": threads, **options}
        return [sys.executable, "-m", "benchmarks.real_agent", "ours", json.dumps(given)]

    return command


def _xllamacpp(threads: int) -> list[str]:
    given = {"file": str(real_models.gguf().absolute()), "threads": threads}
    return [sys.executable, "-m", "benchmarks.real_agent", "xllamacpp", json.dumps(given)]


def _node(threads: int) -> list[str]:
    if shutil.which("node") is None or not (NODE_FOLDER / "node_modules").is_dir():
        raise Missing("it needs npm, which is not installed")
    given = {"file": str(real_models.gguf().absolute()), "threads": threads}
    program = Path(__file__).with_name("real_agent.mjs")
    return ["node", str(program), str(NODE_FOLDER.absolute()), json.dumps(given)]


KEPT: Final = "ours, kept by convert"
SIDES: Final = (
    Side(KEPT, _ours(real_models.kept, prefill_dtype="auto")),
    Side(f"{KEPT}, prefill in bfloat16", _ours(real_models.kept, prefill_dtype="bfloat16")),
    Side("ours, int8", _ours(real_models.int8)),
    Side("ours, GGUF", _ours(real_models.gguf)),
    Side("torch, bfloat16", _ours(real_models.transformers_folder, dtype="bfloat16")),
    Side("torch, float32", _ours(real_models.transformers_folder, dtype="float32")),
    Side("llama.cpp, xllamacpp", _xllamacpp),
    Side("llama.cpp, node-llama-cpp", _node),
)
LLAMA: Final = ("llama.cpp, xllamacpp", "llama.cpp, node-llama-cpp")


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        run: measures one side in one round.
        wanted: the least ratio to the better llama.cpp, with a kept int4 and with a kept int8.
        faster: whether a larger value is better.
    """

    name: str
    run: Callable[[Agent, int], float]
    wanted: tuple[float, float]
    faster: bool = True


def prefill(agent: Agent, number: int) -> float:
    """Prompt tokens per second of a prompt of about 512 tokens that is not cached."""
    rng = Random(100 + number)
    prompt = " ".join(rng.choice(_WORDS) for _ in range(512))
    answer = agent.ask(do="generate", prompts=[prompt], max_tokens=1)
    seconds = answer["tokens"][0][0] - answer["began"]
    return float(answer["prompt_tokens"][0] / seconds)


def decode(count: int, tokens: int) -> Callable[[Agent, int], float]:
    """Completion tokens per second, after the first one, of `count` requests at once."""

    def run(agent: Agent, number: int) -> float:
        begins = [f"Chapter {8 * number + row}: how the stock market began" for row in range(count)]
        rows = agent.ask(do="generate", prompts=begins, max_tokens=tokens)["tokens"]
        began, *times = sorted(time for row in rows for time in row)
        return float(len(times) / (times[-1] - began))

    return run


def guided(agent: Agent, number: int) -> float:
    """Seconds of a proposal after the prefix that all proposals share."""
    messages = proposals.build_messages(_context(number))
    answer = agent.ask(
        do="generate",
        prompts=[chat(messages)],
        max_tokens=proposals.MAX_COMPLETION_TOKENS,
        guidance=proposals.GUIDANCE,
        grammar=to_gbnf(proposals.GUIDANCE),
    )
    proposals.parse(answer["texts"][0])
    return float(answer["tokens"][0][-1] - answer["began"])


def score(agent: Agent, number: int) -> float:
    """Seconds of a score whose proposal and context are not cached."""
    proposal = {"ticker": f"T{number}", "action": "pass", "confidence": 0.5, "rationale": "It is."}
    messages = hermes_plugin.score_messages(proposal, _context(50 + number))
    answer = agent.ask(
        do="score",
        messages=messages,
        prompt=chat(messages),
        choices=list(hermes_plugin.SCORE_ANSWERS),
    )
    return float(answer["seconds"])


_PREFILL_WANTED: Final = 2.0 if "amx_tile" in Path("/proc/cpuinfo").read_text() else 0.8
"""With AMX, torch does the prefill in bfloat16."""
MEASURES: Final = (
    Measure("prefill, 512 tokens: tokens/s", prefill, (_PREFILL_WANTED, _PREFILL_WANTED)),
    Measure("decode: tokens/s", decode(1, 64), (1.0, 0.6)),
    Measure("decode, eight at once: tokens/s", decode(8, 32), (2.0, 2.0)),
    Measure("guided proposal: s", guided, (2.0, 2.0), faster=False),
    Measure("score: s", score, (0.0, 0.0), faster=False),
)


def chat(messages: Sequence[Message]) -> str:
    """The prompt of a chat, in the format of SmolLM2; an answer that is begun goes on."""
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    turns = "".join(
        f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n"
        for one in (messages[:-1] if begun else messages)
    )
    return f"{turns}<|im_start|>assistant\n{begun}"


def _context(number: int) -> str:
    rng = Random(number)
    lines = (
        f"{rng.choice(_WORDS)} {rng.choice(_WORDS)} at {rng.randrange(9999)}" for _ in range(9)
    )
    return f"Long ABC{number % 10} from 100, now 112.5, RSI 81. " + "; ".join(lines)


@contextlib.contextmanager
def running(sides: Sequence[Side], threads: int) -> Iterator[dict[str, Agent]]:
    """The agents of all sides that run here, with their models loaded."""
    agents: dict[str, Agent] = {}
    try:
        for side in sides:
            try:
                agents[side.name] = Agent(side.command(threads))
                agents[side.name].ask(do="load")
            except Missing as error:
                print(f"without {side.name}: {error}", flush=True)
                if side.name in agents:
                    agents.pop(side.name).close()
        yield agents
    finally:
        for agent in agents.values():
            agent.close()


def measured(agents: Mapping[str, Agent], rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each row, and the median of each side; the first round warms up."""
    for measure in MEASURES:
        found: dict[str, list[float]] = {name: [] for name in agents}
        for number in range(rounds + 1):
            for name, agent in agents.items():
                value = measure.run(agent, number)
                if number:
                    found[name].append(value)
        yield measure.name, {name: statistics.median(values) for name, values in found.items()}
    yield (
        "memory above that of an idle process: MB",
        {name: agent.memory() - agent.idle for name, agent in agents.items()},
    )


def ratios(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The rows of the table of ratios: what `convert` keeps, against the better llama.cpp."""
    for measure in MEASURES:
        row = rows[measure.name]
        others = [row[name] for name in LLAMA if name in row]
        if KEPT not in row or not others:
            continue
        best = max(others) if measure.faster else min(others)
        ratio = row[KEPT] / best if measure.faster else best / row[KEPT]
        wanted = measure.wanted[0 if real_models.kept_precision() == "int4" else 1]
        missed = " (missed)" if ratio < wanted else ""
        least = f"at least {wanted:g}" if wanted else ""
        yield f"| {measure.name.partition(':')[0]} | {ratio:.2f}{missed} | {least} |"


def report(threads: int, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The tables of one number of threads."""
    names = list(next(iter(rows.values())))
    lines = [
        f"## {threads} thread{'s' if threads > 1 else ''}",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[side]:.3g}' for side in names)} |")
    lines += [
        "",
        "| kept by convert against the better llama.cpp | ratio | wanted |",
        "|---|---|---|",
    ]
    return [*lines, *ratios(rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=[side.name for side in SIDES])
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--rounds", type=int, default=2, help="in which all sides take turns")
    options = parser.parse_args()
    models.FOLDER.mkdir(parents=True, exist_ok=True)
    sides = [side for side in SIDES if options.only is None or side.name in options.only]
    lines: list[str] = []
    for threads in options.threads:
        with running(sides, threads) as agents:
            rows = dict(measured(agents, options.rounds))
        found = report(threads, rows)
        print("\n".join(found), flush=True)
        lines += found
    if options.only is None:
        lines = ["# Results of `make bench-real`", "", real_models.described(), "", *lines]
        RESULTS.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
