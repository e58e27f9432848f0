"""The commands of `python -m llm_sidecar.db`. Each returns its exit status."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from llm_sidecar import command_line
from llm_sidecar.db import cli_output as output
from llm_sidecar.db import cli_rows, writers
from llm_sidecar.db.cli_rows import Format
from llm_sidecar.db.export import Content, Export
from llm_sidecar.db.filters import Filters
from llm_sidecar.db.location import TABLE_SUFFIX, Location, location_of
from llm_sidecar.db.migrate import migrate
from llm_sidecar.db.nested import with_objects
from llm_sidecar.db.queries import newest
from llm_sidecar.db.read_only import JournalRows, opened_read_only
from llm_sidecar.db.rows import ROW_ID
from llm_sidecar.db.schema import arrow_schemas
from llm_sidecar.db.statistics import statistics
from llm_sidecar.db.store import Store
from llm_sidecar.db.tables import Tables
from llm_sidecar.db.verify import verify
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.settings import DEFAULT_LANCEDB_URI, Database

T = TypeVar("T")

_OPEN_SECONDS: Final = 60.0
_MAKE_SERVE_URI: Final = Path(".data/lancedb")
"""The database of `make serve`."""


class Shape(NamedTuple):
    """How rows are written.

    Attributes:
        wide: whether long values in a table are not shortened.
        out: a file; None for standard output.
    """

    format: Format
    wide: bool
    out: Path | None


async def query_runs(
    table: str, last: int, since: datetime.datetime | None, filters: Filters, shape: Shape
) -> int:
    """Shows the newest rows of a table, newest first."""
    earliest = {} if since is None else {"since": since}
    async with _opened() as (_, tables, waiting):
        rows = await newest(tables, table, last, filters=filters, **earliest)
        added = [
            row
            for row in waiting.rows.get(table, [])
            if (since is None or row["timestamp"] >= since)
            and filters.matches(table, row)
            and row not in rows
        ]
        if added:
            rows = sorted([*added, *rows], key=lambda row: row["timestamp"], reverse=True)
            rows = rows[: last if last > 0 else None]
        _note_missing(JournalRows(unreadable=waiting.unreadable))
    columns = [name for name in arrow_schemas()[table].names if name != ROW_ID]
    if not rows:
        filtered = since is not None or filters.names()
        empty = f"No row of {table} matches." if filtered else f"{table} is empty."
        if shape.format == "table" and shape.out is None:
            output.line(empty)
            return command_line.OK
        command_line.say(empty)
    _write(rows, columns, shape, table)
    return command_line.OK


async def stats(shape: Shape) -> int:
    """Shows how large each table is."""
    async with _opened() as (location, tables, waiting):
        found = await statistics(location, tables)
        _note_missing(waiting)
    _write(found, list(found[0]), shape)
    return command_line.OK


async def compact() -> int:
    """Compacts the tables; fails if another process is compacting them."""
    location = _writable_location("compact")
    async with _store(location) as store:
        before, began = store.status()["fragments"], time.monotonic()
        if not await store.compact():
            command_line.say("Another process is compacting this database.")
            return command_line.FAILED
        for name, count in store.status()["fragments"].items():
            output.line(f"{name}: {before[name]} fragments before, {count} after")
        output.line(f"Compacted in {time.monotonic() - began:.1f} s.")
    return command_line.OK


async def upgrade(*, alone: bool) -> int:
    """Migrates the tables.

    Args:
        alone: whether the operator says that no other machine uses the database.
    """
    location = _writable_location("migrate")
    if location.folder is None and not alone:
        raise DatabaseUnavailable(
            "Other machines may use a database on an object store, and what they write during a "
            "migration is lost; stop all sidecars that use it, then add --alone."
        )
    async for done in migrate(location, command_line.progress):
        output.line(done)
    return command_line.OK


async def check() -> int:
    """Reads every row; fails if the database is damaged."""
    async with _opened() as (_, tables, waiting):
        async with tables.unchanging():
            found = await verify(tables, command_line.progress)
        for table in found:
            duplicates = (
                f"{table.duplicates} ids are duplicates" if table.duplicates else "ids are unique"
            )
            output.line(
                f"{table.table}: {table.rows} of {table.expected} rows are readable, {duplicates}"
            )
        _note_missing(waiting)
    return command_line.OK if all(table.is_sound for table in found) else command_line.FAILED


async def check_writers() -> int:
    """Lets several writers create the same tables; fails if the store loses a commit."""
    location = _writable_location("verify --writers")
    found = await writers.check_writers(location, command_line.progress)
    if not found.lost:
        output.line(
            f"{writers.WRITERS} writers created the same table at once, {writers.ROUNDS} times: no "
            "commit is lost."
        )
        return command_line.OK
    output.line(
        f"{writers.WRITERS} writers created the same table at once, {writers.ROUNDS} times: "
        f"{found.lost} of {found.commits} commits are lost, because the store ignores "
        "If-None-Match. Let one machine alone write to it, or use another store."
    )
    return command_line.FAILED


async def export(content: Content, since: datetime.datetime | None, out: Path | None) -> int:
    """Writes feedback, as JSON lines."""
    earliest = {} if since is None else {"since": since}
    async with _opened() as (_, tables, waiting):
        feedback = Export(tables, content)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(tables.unchanging())
            write = stack.enter_context(output.file_or_stdout(out))
            count = 0
            async for line in feedback.lines(command_line.progress, **earliest):
                # ASCII, because half of a surrogate pair is valid in JSON but not in UTF-8.
                write(json.dumps(line) + "\n")
                count += 1
        reasons = [f"{number} {reason}" for reason, number in feedback.left_out.items() if number]
        left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
        command_line.say(f"{count} rows{left_out}")
        _note_missing(waiting)
    return command_line.OK


async def read(query: Callable[[Tables, JournalRows], Awaitable[T]]) -> T:
    """Runs a query for a command of another package."""
    async with _opened() as (_, tables, waiting):
        return await query(tables, waiting)


def database_uri() -> str:
    """`LANCEDB_URI`; if unset, the folder in the container or of `make serve`, if one exists.

    If both exist, the container's comes first, unless it holds no table.

    Raises:
        DatabaseUnavailable: it is not set, and neither folder exists.
    """
    configured = Database.from_environ()
    if "uri" in configured.model_fields_set:
        return configured.uri
    in_container = Path(DEFAULT_LANCEDB_URI)
    if os.path.lexists(in_container) and not (_MAKE_SERVE_URI.is_dir() and _is_empty(in_container)):
        return DEFAULT_LANCEDB_URI
    if not _MAKE_SERVE_URI.is_dir():
        raise DatabaseUnavailable(
            f"There is no database at {DEFAULT_LANCEDB_URI} or {_MAKE_SERVE_URI}; set LANCEDB_URI."
        )
    if sys.stderr.isatty():
        command_line.say(f"LANCEDB_URI is not set; using {_MAKE_SERVE_URI}.")
    return str(_MAKE_SERVE_URI)


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds no table; False if it cannot be read."""
    try:
        return not any(path.name.endswith(TABLE_SUFFIX) for path in folder.iterdir())
    except OSError:
        return False


def _writable_location(command: str) -> Location:
    location = location_of(database_uri())
    is_there = location.folder is None or os.path.isdir(location.folder)  # noqa: PTH112 this never raises
    if is_there and not location.may_write():
        raise DatabaseUnavailable(
            f"The database at {location.shown} is read-only; {command} has to write to it."
        )
    return location


@contextlib.asynccontextmanager
async def _store(location: Location) -> AsyncIterator[Store]:
    # The command line never creates a database.
    uri = location.uri if location.folder is None else location.shown
    store = await Store.open(uri, create=False, timeout=_OPEN_SECONDS)
    try:
        for repair in store.status()["repairs"]:
            command_line.say(repair)
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def _opened() -> AsyncIterator[tuple[Location, Tables, JournalRows]]:
    location = location_of(database_uri())
    if not location.may_write():
        async with opened_read_only(location) as (tables, waiting):
            yield location, tables, waiting
        return
    async with _store(location) as store:
        yield location, await store.moved(_OPEN_SECONDS), JournalRows()


def _note_missing(waiting: JournalRows) -> None:
    if count := waiting.count():
        rows = "row is" if count == 1 else "rows are"
        command_line.say(f"{count} {rows} still in the journal and not counted here.")
    if waiting.unreadable:
        command_line.say("The newest rows may be missing: the journal cannot be read.")


def _write(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], shape: Shape, table: str | None = None
) -> None:
    with output.file_or_stdout(shape.out) as write:
        if shape.format == "parquet":
            write(cli_rows.as_parquet(rows, columns, table))
            return
        if table is not None:
            rows = [with_objects(table, row) for row in rows]
        if shape.format == "jsonl":
            write(cli_rows.as_jsonl(rows))
        elif shape.format == "csv":
            if shape.out is None:
                command_line.write_as_utf8()
            write(cli_rows.as_csv(rows, columns))
        else:
            write(
                cli_rows.as_table(
                    rows,
                    columns,
                    width=shutil.get_terminal_size().columns,
                    wide=shape.wide,
                    encoding="utf-8" if shape.out else sys.stdout.encoding or "utf-8",
                )
            )
