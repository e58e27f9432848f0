"""`python -m llm_sidecar.db`: looking at the tables."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from llm_sidecar.db.schema import RUNS, TABLES
from llm_sidecar.db.store import Store, default_uri
from llm_sidecar.errors import DatabaseUnavailable

_CELL: Final = 40
"""Characters of a value that a table on a terminal shows."""


def cli_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; this process's unless given.

    Returns:
        The exit status: 0, 1 when the database cannot be read, 2 for bad arguments.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        rows = asyncio.run(_last(options.table, options.last))
    except DatabaseUnavailable as error:
        sys.stderr.write(f"{error.detail}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        _show(rows, options.table, as_json=options.json or not sys.stdout.isatty())
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m llm_sidecar.db", description="Looks at the tables.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    query = commands.add_parser("query-runs", help="show the newest rows of a table")
    query.add_argument("--last", type=int, default=5, metavar="N", help="0 or less for all; 5")
    query.add_argument("--table", choices=TABLES, default=RUNS, help=f"default: {RUNS}")
    query.add_argument("--json", action="store_true", help="JSON lines, as when piped")
    return parser


async def _last(table: str, count: int) -> list[dict[str, Any]]:
    # Looking must not create anything.
    store = await Store.open(default_uri(), create=False)
    try:
        return await store.last(table, count)
    finally:
        await store.close()


def _show(rows: list[dict[str, Any]], table: str, *, as_json: bool) -> None:
    if not rows:
        # Not on standard output when piped, where every line is a row.
        (sys.stderr if as_json else sys.stdout).write(f"{table} is empty.\n")
        return
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(row, default=lambda value: value.isoformat()) + "\n")
        return
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value.isoformat() if hasattr(value, "isoformat") else str(value)
    # What people wrote must not steer the terminal.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
