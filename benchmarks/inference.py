"""How fast models answer: `make bench` writes benchmarks/RESULTS.md.

Each row is a ratio whose two sides ran in turns in this run, on models of about 100 million random
weights unless it says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import adapters, prefill, proposing, start, streaming, throughput
from benchmarks.table import Row, machine

RESULTS: Final = Path(__file__).with_name("RESULTS.md")
MEASURES: Final[dict[str, Callable[[int], Iterator[Row]]]] = {
    "proposals": proposing.proposals_over_http,
    "prefix": prefill.first_token,
    "score": prefill.one_score,
    "transformers": throughput.against_transformers_serve,
    "sixteen": proposing.sixteen_at_once,
    "replicas": proposing.sixteen_on_replicas,
    "streams": streaming.first_token_over_http,
    "threads": throughput.threads_of_two_models,
    "adapters": adapters.swapped_under_load,
    "start": start.memory_and_start,
    "command line": start.command_line,
}


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


if __name__ == "__main__":
    main()
