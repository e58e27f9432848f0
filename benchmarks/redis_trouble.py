"""Requests while Redis is in trouble: `python -m benchmarks.redis_trouble`.

Feedback and proposals of models that answer at once, at a steady rate, in turns with Redis well and
with Redis in one kind of trouble: behind a line of two seconds, stopped, killed, or answering one
of ten passing errors. The time of a request counts from when it was due. Wanted: the 99th
percentile in trouble is at most 1.2 times that without; no request fails, and afterwards the stream
has every event once, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.redis_trouble import RATE, TROUBLES, Answered, sidecar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind of trouble")
    parser.add_argument("--turns", type=int, default=2, help="into which they are divided")
    parser.add_argument("--kinds", nargs="+", choices=TROUBLES, default=TROUBLES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), options.kinds, options.seconds, options.turns))


async def run(folder: Path, kinds: Sequence[str], seconds: float, turns: int) -> None:
    well: list[Answered] = []
    ill: dict[str, list[Answered]] = {kind: [] for kind in kinds}
    beside: dict[str, list[Answered]] = {kind: [] for kind in kinds}
    ratios = []
    async with sidecar(folder) as troubled:
        await troubled.load.run(2.0)  # warms up
        for turn in range(turns):
            for kind in kinds:
                since = len(beside[kind]), len(ill[kind])
                # The sides change their order, so that neither always follows the other.
                for side in sorted(("ill", "well"), reverse=bool(turn % 2)):
                    if side == "well":
                        beside[kind] += await troubled.load.run(seconds / turns)
                    else:
                        async with troubled.trouble(kind):
                            ill[kind] += await troubled.load.run(seconds / turns)
                        await troubled.recovered()
                (_, usual), (_, p99) = (
                    percentiles(answers[first:])
                    for answers, first in zip((beside[kind], ill[kind]), since, strict=True)
                )
                ratios.append(p99 / usual)
        await troubled.recovered()
        troubled.check()
        count = len(troubled.load.answers)
    print(f"{RATE:g} requests/s, {seconds:g} s of each trouble and as much without beside it")
    for kind in kinds:
        well += beside[kind]
        show(kind, beside[kind], ill[kind])
    show("all", well, [answer for answers in ill.values() for answer in answers])
    print(f"median of the ratios of {len(ratios)} turns: {statistics.median(ratios):.2f}")
    print(f"of {count} requests none failed; every event is in the stream once, in order")


def show(name: str, well: Sequence[Answered], ill: Sequence[Answered]) -> None:
    (well_median, well_p99), (ill_median, ill_p99) = percentiles(well), percentiles(ill)
    print(
        f"{name:11} p50 {well_median:5.1f} ms well, {ill_median:5.1f} ms in trouble; p99 "
        f"{well_p99:5.1f} ms and {ill_p99:5.1f} ms, ratio {ill_p99 / well_p99:.2f} (wanted: 1.2)",
        flush=True,
    )


def percentiles(answers: Sequence[Answered]) -> tuple[float, float]:
    """The median and the 99th percentile, in milliseconds."""
    cuts = statistics.quantiles([answer.answered - answer.due for answer in answers], n=100)
    return 1000 * cuts[49], 1000 * cuts[98]


if __name__ == "__main__":
    main()
