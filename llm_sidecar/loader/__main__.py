"""The command line `python -m llm_sidecar.loader`, which converts models and adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from llm_sidecar import command_line
from llm_sidecar.models import files
from llm_sidecar.models.conversion import MAX_PERPLEXITY_RATIO, Precision, convert
from llm_sidecar.models.lora import convert_adapter
from llm_sidecar.settings import DEFAULT_PHI3, Settings

PROG: Final = "python -m llm_sidecar.loader"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run_app(app, arguments, PROG)


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Convert models and adapters for the sidecar."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("convert")
def _convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A transformers folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder; it must not exist.")],
    precision: Annotated[
        Precision,
        typer.Option(
            help="The precision of the weights. With int4, several ways are tried, and int8 where "
            "none is good enough."
        ),
    ] = "int4",
    max_perplexity_ratio: Annotated[
        float,
        typer.Option(min=1.0, help="The largest accepted ratio of perplexity, result to source."),
    ] = MAX_PERPLEXITY_RATIO,
) -> None:
    """Convert a transformers folder for onnxruntime."""
    conversion = convert(
        source, out, precision, command_line.say, max_perplexity_ratio=max_perplexity_ratio
    )
    typer.echo(conversion.table())
    kept = conversion.kept
    asked = f"{precision} loses too much, so this is" if conversion.fallback else "It is"
    typer.echo(
        f"{out} is converted. {asked} {kept.name}: its perplexity is "
        f"{kept.quality.perplexity_ratio:.3f} times that of {source}"
    )


@app.command("adapter")
def _adapter(
    source: Annotated[
        Path, typer.Argument(metavar="PEFT_DIR", help="A folder with a PEFT adapter.")
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_DIR",
            help="The new folder, which must not exist: YYYYMMDD or YYYYMMDD-dpo in "
            "PHI3_ADAPTER_DIR.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="The Phi-3 model that the adapter is for: its file or folder. Default: "
            "MICRO_LLM_MODEL_PATH, else the model at its default path, else the demo model."
        ),
    ] = None,
) -> None:
    """Convert a PEFT adapter for Phi-3 on onnxruntime."""
    base = _base_model(model)
    moved = convert_adapter(source, base.folder, out)
    typer.echo(
        f"{out} changes the probabilities of {base.label}'s next tokens by {moved:.3f} on average"
    )


def _base_model(model: Path | None) -> files.ModelFiles:
    settings = Settings.from_environ()
    # The demo model is a fallback, as with `make serve`. A wrong path in the setting is an error.
    changes = {"demo": True} | ({} if model is None else {"phi3_path": model})
    models = settings.models.model_copy(update=changes)
    base = files.locate_phi3(settings.model_copy(update={"models": models}))
    if base.folder == files.DEMO_DIR / "phi3" and not settings.models.demo and model is None:
        command_line.say(
            f"There is no model at {DEFAULT_PHI3} and MICRO_LLM_MODEL_PATH is not set, so the "
            "adapter is for the demo model."
        )
    return base


if __name__ == "__main__":
    sys.exit(main())
