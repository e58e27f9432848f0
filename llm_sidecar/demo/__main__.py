"""`python -m llm_sidecar.demo`: train the demo models, or measure them."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from llm_sidecar.demo.evaluate import evaluate
from llm_sidecar.demo.recipe import PROCESSES, Member, train_hermes, train_phi3
from llm_sidecar.errors import SidecarError

_HERE = Path(__file__).parent


def main() -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args()
    try:
        return int(options.run(options))
    except (SidecarError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm_sidecar.demo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train both models, about an hour on two cores")
    train.add_argument("--out", type=Path, default=_HERE, help="folder for phi3/ and hermes/")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--only", choices=("phi3", "hermes"), help="train one of them")
    train.add_argument("--scale", type=float, default=1.0, help="train on this part of the tokens")
    train.set_defaults(run=_train)
    measure = commands.add_parser("evaluate", help="measure what the models promise")
    measure.add_argument("--models", type=Path, default=_HERE, help="folder of phi3/ and hermes/")
    measure.set_defaults(run=_evaluate)
    return parser


def _train(options: argparse.Namespace) -> int:
    for name, train in (("phi3", train_phi3), ("hermes", train_hermes)):
        if options.only in (None, name) and (status := _together(train, name, options)):
            return status
    return 0


def _together(train: Callable[..., None], name: str, options: argparse.Namespace) -> int:
    """Trains one model in several processes; returns the first exit status that is not 0."""
    # Room for all shapes of batches: what torch and oneDNN compiled for one is not compiled again.
    os.environ.update(LRU_CACHE_CAPACITY="2048", ONEDNN_PRIMITIVE_CACHE_CAPACITY="2048")
    # And glibc keeps its memory: the system's zeroing of pages took up to a quarter of the time.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        running = [
            spawn.Process(
                target=train,
                args=(options.out / name, Member(rank, PROCESSES, Path(folder, "meeting"))),
                kwargs={"seed": options.seed, "scale": options.scale},
                daemon=True,
            )
            for rank in range(PROCESSES)
        ]
        # The end of this process ends the others too, however it is asked to.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for process in running:
            process.start()
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running])
            if failed := [process.exitcode for process in running if process.exitcode]:
                # The other would wait for it for ever.
                for process in running:
                    process.terminate()
                return abs(failed[0])
            running = [process for process in running if process.exitcode is None]
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    figures = evaluate(options.models)
    for figure in figures:
        promise = "" if figure.promised is None else f"  at least {figure.promised:.1%}"
        broken = "" if figure.kept else "  MISSED"
        line = f"{figure.name:<48} {figure.value:7.1%} of {figure.count:3d}{promise}{broken}"
        print(line)
    return 0 if all(figure.kept or figure.optional for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
