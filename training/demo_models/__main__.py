"""`python -m training.demo_models`: train the demo models and draw their held-out cases."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm_sidecar import command_line
from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import held_out
from training.demo_models.processes import train

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
    for name in ("phi3", "hermes"):
        if only in (None, name) and (status := train(name, out / name, seed, scale)):
            return status
    if only in (None, "cases"):
        held_out.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
