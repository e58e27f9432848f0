"""`python -m llm_sidecar.db`: looking at the tables, and looking after them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from llm_sidecar.db import cli_output as output
from llm_sidecar.db.export import FORMATS, Export
from llm_sidecar.db.migrate import migrate
from llm_sidecar.db.place import default_uri, place_of
from llm_sidecar.db.run import run
from llm_sidecar.db.schema import RUNS, TABLES
from llm_sidecar.db.statistics import statistics
from llm_sidecar.db.store import Store
from llm_sidecar.db.verify import verify

Command = Callable[[argparse.Namespace], Coroutine[Any, Any, int]]
_OPEN_SECONDS: Final = 60.0
_SPANS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def cli_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; this process's unless given.

    Returns:
        The exit status: 0; 1 when the database cannot be used or is not sound; 2 for bad arguments;
        130 after Ctrl-C.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    command: Command = options.run
    try:
        status = run(command(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 lancedb raises many types
        output.note(output.reason(error))
        return 1
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        # One line, whatever the arguments hold.
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m llm_sidecar.db",
        description="Looks at the database at LANCEDB_URI, and looks after it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    query = add("query-runs", _query_runs, "show the newest rows of a table")
    query.add_argument("--last", type=int, default=5, metavar="N", help="0 or less for all; 5")
    query.add_argument("--table", choices=TABLES, default=RUNS, help=f"default: {RUNS}")
    query.add_argument("--status", help="only runs with this status, such as error")
    _add_since(query)
    query.add_argument("--json", action="store_true", help="JSON lines, as when piped")
    stats = add("stats", _stats, "show rows, files and bytes of each table")
    stats.add_argument("--json", action="store_true", help="JSON lines, as when piped")
    add("compact", _compact, "join small files and delete versions that nobody reads any more")
    add("migrate", _migrate, "bring tables of older versions to today's")
    add("verify", _verify, "read every row, and check that ids are unique")
    export = add("export", _export, "write training data from feedback, as JSON lines")
    export.add_argument("--format", choices=FORMATS, required=True, dest="kind")
    _add_since(export)
    export.add_argument("--out", type=Path, help="a file; standard output unless given")
    return parser


def _add_since(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--since",
        type=_time,
        metavar="TIME",
        help="only from this time on: ISO 8601 (UTC unless it says), or a span such as 24h or 7d",
    )


def _time(text: str) -> datetime.datetime:
    try:
        if text[-1:] in _SPANS:
            span = datetime.timedelta(**{_SPANS[text[-1]]: float(text[:-1])})
            return datetime.datetime.now(datetime.UTC) - span
        found = datetime.datetime.fromisoformat(text)
        aware = found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found
        return aware.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-01-31 or 7d") from None


async def _with_store(work: Callable[[Store], Coroutine[Any, Any, int]]) -> int:
    # Looking must not create anything.
    store = await Store.open(default_uri(), create=False, timeout=_OPEN_SECONDS)
    try:
        for repair in store.status()["repairs"]:
            output.note(repair)
        return await work(store)
    finally:
        await store.close()


async def _query_runs(options: argparse.Namespace) -> int:
    if options.status is not None and options.table != RUNS:
        output.note(f"--status is of {RUNS} only; {options.table} has none")
        return 2

    async def work(store: Store) -> int:
        rows = await store.last(
            options.table, options.last, since=options.since, status=options.status
        )
        filtered = options.since or options.status is not None
        empty = f"No row of {options.table} matches." if filtered else f"{options.table} is empty."
        output.rows(rows, empty, as_json=options.json)
        return 0

    return await _with_store(work)


async def _stats(options: argparse.Namespace) -> int:
    async def work(store: Store) -> int:
        found = await statistics(place_of(default_uri()), await store.opened())
        output.rows(found, "", as_json=options.json)
        return 0

    return await _with_store(work)


async def _compact(_: argparse.Namespace) -> int:
    async def work(store: Store) -> int:
        before, began = store.status()["fragments"], time.monotonic()
        if not await store.compact():
            output.note("Another process compacts this database at the moment.")
            return 1
        for name, count in store.status()["fragments"].items():
            output.line(f"{name}: {before[name]} fragments before, {count} after")
        output.line(f"Compacted in {time.monotonic() - began:.1f} s.")
        return 0

    return await _with_store(work)


async def _migrate(_: argparse.Namespace) -> int:
    async for done in migrate(place_of(default_uri()), output.progress):
        output.line(done)
    return 0


async def _verify(_: argparse.Namespace) -> int:
    async def work(store: Store) -> int:
        tables = await store.opened()
        async with tables.unchanging():
            found = await verify(tables, output.progress)
        for table in found:
            doubled = f"{table.doubled} ids come twice" if table.doubled else "ids are unique"
            output.line(
                f"{table.table}: {table.rows} of {table.expected} rows are readable, {doubled}"
            )
        return 0 if all(table.is_sound for table in found) else 1

    return await _with_store(work)


async def _export(options: argparse.Namespace) -> int:
    async def work(store: Store) -> int:
        since = {} if options.since is None else {"since": options.since}
        tables = await store.opened()
        export = Export(tables, options.kind, **since)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(tables.unchanging())
            write = stack.enter_context(output.file_or_stdout(options.out))
            count = 0
            async for row in export.rows(output.progress):
                # ASCII, as half of a surrogate pair, which JSON can hold, has no UTF-8.
                write(json.dumps(row) + "\n")
                count += 1
        skipped = f"; left out: {export.skipped}" if str(export.skipped) else ""
        output.note(f"{count} rows{skipped}")
        return 0

    return await _with_store(work)
