"""`python -m llm_sidecar.demo evaluate`: measure the demo models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llm_sidecar import command_line
from llm_sidecar.demo.evaluate import evaluate

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run_app(app, argv, "python -m llm_sidecar.demo")


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Measure the demo models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("evaluate")
def _evaluate(
    models: Annotated[Path, typer.Option(help="Folder of phi3/ and hermes/.")] = Path(
        __file__
    ).parent,
) -> int:
    """Print the figures of the model card; exit with 1 if a target is missed."""
    figures = evaluate(models)
    for figure in figures:
        target = "" if figure.target is None else f"  at least {figure.target:.1%}"
        missed = "" if figure.met else "  MISSED"
        typer.echo(f"{figure.name:<48} {figure.value:7.1%} of {figure.count:3d}{target}{missed}")
    return 0 if all(figure.met or figure.optional for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
