"""`python -m llm_sidecar.demo`: train the demo models, or measure them."""

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
from llm_sidecar.demo.evaluate import evaluate
from llm_sidecar.demo.recipe import PROCESSES, Member, train_hermes, train_phi3

_HERE = Path(__file__).parent


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run_app(app, argv, "python -m llm_sidecar.demo")


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Train the demo models, or measure them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("train")
def _train(
    out: Annotated[Path, typer.Option(help="Folder for phi3/ and hermes/.")] = _HERE,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 1,
    only: Annotated[
        Literal["phi3", "hermes"] | None, typer.Option(help="Train only this one.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Fraction of the tokens to train on.")] = 1.0,
) -> int:
    """Train both models, about an hour on two cores."""
    for name, train in (("phi3", train_phi3), ("hermes", train_hermes)):
        if only in (None, name) and (status := _together(train, out / name, seed, scale)):
            return status
    return 0


def _together(train: Callable[..., None], out: Path, seed: int, scale: float) -> int:
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
                args=(out, Member(rank, PROCESSES, Path(folder, "meeting"))),
                kwargs={"seed": seed, "scale": scale},
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


@app.command("evaluate")
def _evaluate(
    models: Annotated[Path, typer.Option(help="Folder of phi3/ and hermes/.")] = _HERE,
) -> int:
    """Measure the figures of the model card."""
    figures = evaluate(models)
    for figure in figures:
        promise = "" if figure.promised is None else f"  at least {figure.promised:.1%}"
        broken = "" if figure.kept else "  MISSED"
        line = f"{figure.name:<48} {figure.value:7.1%} of {figure.count:3d}{promise}{broken}"
        typer.echo(line)
    return 0 if all(figure.kept or figure.optional for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
