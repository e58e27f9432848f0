"""`python -m training.demo_models`: train the demo models and draw their held-out cases."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm_sidecar import command_line
from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import held_out
from training.demo_models.recipe import PROCESSES, Member, train_hermes, train_phi3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run_app(app, argv, "python -m training.demo_models")


@app.command()
def _train(
    out: Annotated[Path, typer.Option(help="Folder for phi3/ and hermes/.")] = DEMO_DIR,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 1,
    only: Annotated[
        Literal["phi3", "hermes", "cases"] | None,
        typer.Option(help="Train only this model, or only draw the held-out cases."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Fraction of the tokens to train on.")] = 1.0,
) -> int:
    """Train both models, about an hour on two cores, and draw the held-out cases."""
    for name, train in (("phi3", train_phi3), ("hermes", train_hermes)):
        if only in (None, name) and (status := _run_processes(train, out / name, seed, scale)):
            return status
    if only in (None, "cases"):
        held_out.write(out)
    return 0


def _run_processes(train: Callable[..., None], out: Path, seed: int, scale: float) -> int:
    """Trains one model in `PROCESSES` processes; returns the first exit status that is not 0."""
    # Compiling a matrix product for a new shape is slow, so torch and oneDNN cache all shapes.
    os.environ.update(LRU_CACHE_CAPACITY="2048", ONEDNN_PRIMITIVE_CACHE_CAPACITY="2048")
    # glibc keeps freed memory: zeroing new pages in the kernel took up to a quarter of the time.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        running = [
            spawn.Process(
                target=train,
                args=(out, Member(rank, PROCESSES, Path(folder, "rendezvous"))),
                kwargs={"seed": seed, "scale": scale},
                daemon=True,
            )
            for rank in range(PROCESSES)
        ]
        # A normal exit ends the daemon processes too; SIGTERM alone would leave them running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for process in running:
            process.start()
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running])
            if failed := [process.exitcode for process in running if process.exitcode]:
                # The others would wait for it for ever.
                for process in running:
                    process.terminate()
                return abs(failed[0])
            running = [process for process in running if process.exitcode is None]
    return 0


if __name__ == "__main__":
    sys.exit(main())
