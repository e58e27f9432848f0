"""The command line that reads and maintains the database: its arguments."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from llm_sidecar import timestamps
from llm_sidecar.db import cli_commands as commands
from llm_sidecar.db.cli_rows import Format
from llm_sidecar.db.filters import Filters
from llm_sidecar.db.interruptible import run
from llm_sidecar.db.rows import RUNS, TABLES

PROG: Final = "python -m llm_sidecar.db"

TableName = Literal[
    "phi3_feedback", "orchestrator_runs", "hermes_scores", "proposals", "feedback_withdrawals"
]
Action = Literal["adjust", "pass", "abort"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Read and maintain the database at LANCEDB_URI."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _time(text: str) -> datetime.datetime:
    try:
        return timestamps.since(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _number(value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number from 0 to 1.")
    return value


def text(value: str | None) -> str | None:
    """The callback of an argument that must be text."""
    # Python represents undecodable bytes of an argument as halves of surrogate pairs.
    if value is not None and any("\ud800" <= char <= "\udfff" for char in value):
        raise typer.BadParameter("it is not text in the encoding of this terminal.")
    return value


Since = Annotated[
    datetime.datetime | None,
    typer.Option(
        parser=_time,
        metavar="TIME",
        help="Only rows since then: ISO 8601 (UTC without an offset), or an age such as 24h or 7d.",
    ),
]
AsFormat = Annotated[
    Format | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, jsonl, csv or parquet. Default: table on a terminal, jsonl elsewhere.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", hidden=True, help="The same as --format jsonl.")]
Wide = Annotated[bool, typer.Option("--wide", help="Do not shorten long values in a table.")]
Out = Annotated[Path | None, typer.Option(help="A file. Default: standard output.")]


@app.command("query-runs")
def _query_runs(
    last: Annotated[int, typer.Option(metavar="N", help="How many rows; 0 or less for all.")] = 5,
    table: Annotated[
        TableName, typer.Option(metavar="NAME", help=f"One of {', '.join(TABLES)}.")
    ] = RUNS,
    since: Since = None,
    status: Annotated[
        str | None,
        typer.Option(callback=text, help="Only runs with this status, such as error."),
    ] = None,
    ticker: Annotated[
        str | None, typer.Option(callback=text, help="Only proposals for this ticker.")
    ] = None,
    action: Annotated[Action | None, typer.Option(help="Only proposals with this action.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            callback=text, help="Only proposals that this model wrote, such as phi3/demo."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, callback=_number, help="Only rows with at least this score."),
    ] = None,
    as_format: AsFormat = None,
    wide: Wide = False,
    out: Out = None,
    as_json: AsJson = False,
) -> int:
    """Show the newest rows of a table."""
    filters = Filters(status, ticker, action, model, min_score)
    if misplaced := filters.misplaced(table):
        name, tables = misplaced
        option = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(f"{option} is for {', '.join(tables)}, not for {table}.")
    layout = commands.Shape(_format(as_format, as_json, out), wide, out)
    return run(commands.query_runs(table, last, since, filters, layout))


@app.command("stats")
def _stats(
    as_format: AsFormat = None, wide: Wide = False, out: Out = None, as_json: AsJson = False
) -> int:
    """Show the rows, files and bytes of each table."""
    return run(commands.stats(commands.Shape(_format(as_format, as_json, out), wide, out)))


@app.command("compact")
def _compact() -> int:
    """Merge small files and delete unused table versions."""
    return run(commands.compact())


@app.command("migrate")
def _migrate(
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="No other machine uses the database; needed on an object store.",
        ),
    ] = False,
) -> int:
    """Upgrade the tables of an older version."""
    return run(commands.upgrade(alone=alone))


@app.command("verify")
def _verify(
    writers: Annotated[
        bool,
        typer.Option(
            "--writers", help="Instead, check that several machines can write at the same time."
        ),
    ] = False,
) -> int:
    """Read every row and check that ids are unique."""
    return run(commands.check_writers() if writers else commands.check())


def _format(given: Format | None, as_json: bool, out: Path | None) -> Format:
    on_terminal = out is None and sys.stdout.isatty()
    output_format = given or ("table" if on_terminal and not as_json else "jsonl")
    if output_format == "parquet" and on_terminal:
        raise typer.BadParameter("parquet is not for a terminal: use --out FILE or a pipe.")
    return output_format
