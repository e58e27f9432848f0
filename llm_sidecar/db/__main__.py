"""`python -m llm_sidecar.db`.

The commands `export` and `replay` are here, not in `cli`, because they need packages that import
the database.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from llm_sidecar import command_line
from llm_sidecar.db import cli_commands
from llm_sidecar.db.cli import PROG, Out, Since, app, text
from llm_sidecar.db.cli_output import reason
from llm_sidecar.db.export import RECORDS, Content
from llm_sidecar.db.interruptible import run

ExportFormat = Literal["sft", "dpo", "jsonl"]


def cli_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; see `llm_sidecar.db.cli_main`."""
    return command_line.run_app(app, argv, PROG, reason)


@app.command("export")
def _export(
    kind: Annotated[ExportFormat, typer.Option("--format", help="The content of each line.")],
    since: Since = None,
    out: Out = None,
) -> int:
    """Write training data from feedback, as JSON lines."""
    return run(cli_commands.export(_content(kind), since, out))


@app.command("replay")
def _replay(
    transaction_id: Annotated[
        str, typer.Argument(callback=text, help="The transaction_id of a stored proposal.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> int:
    """Generate a stored proposal again, and say what differs.

    The exit status is 0 if proposal, critique and score are the same.
    """
    # Imported here, because no other command needs models.
    from llm_sidecar.services import replay_command

    return run(replay_command.command(transaction_id, as_json=as_json))


def _content(kind: ExportFormat) -> Content:
    if kind == "jsonl":
        return RECORDS
    # Imported here, because no other command needs proposals.
    from llm_sidecar.tuning import dataset

    return dataset.CHATS if kind == "sft" else dataset.PAIRS


def main() -> int:
    """Runs the command line of this process; returns the exit status."""
    # The command line itself reports errors.
    logging.getLogger("llm_sidecar").addHandler(logging.NullHandler())
    return cli_main()


if __name__ == "__main__":
    sys.exit(main())
