"""Encodes rows as JSON text for the journal, and as Arrow tables for LanceDB."""

from __future__ import annotations

import datetime
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from llm_sidecar.db.rows import KEYS
from llm_sidecar.db.schema import arrow_schemas, upgraded
from llm_sidecar.journal.locks import dated, sync_folder
from llm_sidecar.journal.rows import Entry

_TIMES: Final = ("timestamp", "received")
_STORED_IN: Final = "stored_in"
"""Not a column: the id of the database that has published feedback, according to its publisher."""


class Decoded(NamedTuple):
    """Rows for LanceDB.

    Attributes:
        tables: Arrow tables, by (name of the table, whether it may already contain these rows).
        unreadable: rows that are damaged, or have columns of another version.
    """

    tables: dict[tuple[str, bool], Any]
    unreadable: list[Entry]


def encoded(
    table: str, values: Mapping[str, Any], *, again: bool = False, stored_in: str | None = None
) -> Entry:
    """A row for the journal.

    Args:
        values: by column.
        again: whether the table may already contain the row.
        stored_in: the id of a database that has the row; `decoded` leaves it out there. The id of
            this process's database may not be known yet.
    """
    data = values if stored_in is None else {**values, _STORED_IN: stored_in}
    return Entry(table, values[KEYS[table]], _encode(data).encode(), again)


def _iso(value: datetime.datetime) -> str:
    return value.isoformat()


_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_iso).encode


def decoded(entries: Iterable[Entry], database_id: str | None = None) -> Decoded:
    """Converts rows of the journal to Arrow tables.

    Args:
        database_id: of the database that they are for.
    """
    rows: dict[tuple[str, bool], list[tuple[Entry, dict[str, Any]]]] = defaultdict(list)
    unreadable = []
    for entry in entries:
        values, stored_in = _parsed(entry.target, entry.data)
        if values is None:
            unreadable.append(entry)
        elif stored_in is None or stored_in != database_id:
            rows[entry.target, entry.again].append((entry, values))
    tables = {}
    for (table, again), found in rows.items():
        try:
            tables[table, again] = arrow(table, [values for _, values in found])
        except _NOT_ARROW:
            good = [pair for pair in found if _is_arrow(table, pair[1])]
            unreadable += [entry for entry, _ in found if not any(entry is one for one, _ in good)]
            tables[table, again] = arrow(table, [values for _, values in good])
    return Decoded(tables, unreadable)


_NOT_ARROW: Final = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What pyarrow raises for a value of a wrong type: its errors are ValueError or TypeError."""


def values_of(table: str, data: bytes) -> dict[str, Any] | None:
    """The columns of a row of the journal; None if it is damaged or of an unknown version."""
    return _parsed(table, data)[0]


def _parsed(table: str, data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The columns of a row, and the id of the database that already has it."""
    try:
        values = json.loads(data)
        stored_in = values.pop(_STORED_IN, None)
        for name in _TIMES:
            if name in values:
                values[name] = datetime.datetime.fromisoformat(values[name])
        return upgraded(table, values), stored_in
    except _NOT_ARROW:
        return None, None


def arrow(table: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as an Arrow table with the schema of their table."""
    import pyarrow as pa

    schema = arrow_schemas()[table]
    found = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    for field in schema:
        # pyarrow does not check for nulls.
        if not field.nullable and found[field.name].null_count:
            raise ValueError(f"{field.name} is null")
    return found


def _is_arrow(table: str, row: Mapping[str, Any]) -> bool:
    try:
        arrow(table, [row])
    except _NOT_ARROW:
        return False
    return True


def keep(entries: Sequence[Entry], folder: Path) -> Path:
    """Writes rows to a new file, one a line, which survives a power loss; returns its path."""
    path = dated(folder, "rows.jsonl")
    with path.open("xb") as file:
        for entry in entries:
            file.write(entry.target.encode() + b"\t" + entry.data + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return path
