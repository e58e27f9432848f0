"""Rows in the formats of the command line: a table for people, the others for programs."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

Format = Literal["table", "jsonl", "csv", "parquet"]
Row = Mapping[str, Any]

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""Text that begins so is a formula to a spreadsheet."""


def as_jsonl(rows: Iterable[Row]) -> str:
    """One JSON object a line, in ASCII."""
    return "".join(f"{json.dumps(_plain(row), allow_nan=False)}\n" for row in rows)


def as_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """RFC 4180: a header, quoted where it is needed, lines that end in CR LF. Objects are JSON.

    A spreadsheet would run text that begins like a formula, so such text gets a `'` before it.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(row[name]) for name in columns])
    return text.getvalue()


def as_parquet(rows: Iterable[Row], columns: Sequence[str], table: str | None) -> bytes:
    """A Parquet file with the columns and types of the table, objects in text columns as JSON text.

    Args:
        table: a table of the database; None for rows that are of none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    from llm_sidecar.db.schema import arrow_schemas

    schema = None
    if table is not None:
        schema = pa.schema([arrow_schemas()[table].field(name) for name in columns])
    data = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    file = io.BytesIO()
    parquet.write_table(data, file)
    return file.getvalue()


def as_table(
    rows: Sequence[Row], columns: Sequence[str], *, width: int, wide: bool, encoding: str
) -> str:
    """Lines for a terminal: a table where it is wide enough, else a block of lines for each row.

    Characters that would steer the terminal are escaped.

    Args:
        width: of the terminal, in cells.
        wide: whether long values are shown whole, however long the lines get.
        encoding: of the terminal.
    """
    # rich is for terminals only.
    from llm_sidecar.db.cli_table import Layout

    cells = [[_shown(row[name], encoding, wide) for name in columns] for row in rows]
    has_ellipsis = "…".encode(encoding, "ignore") != b""
    return Layout(width, wide, "ellipsis" if has_ellipsis else "crop").lines(columns, cells)


def _shown(value: Any, encoding: str, wide: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        text = value.isoformat() if wide else f"{value.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S}"
    elif isinstance(value, dict | list):
        text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    else:
        text = str(value)
    # What people wrote must not steer the terminal.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    plain = _plain(value)
    return json.dumps(plain, separators=(",", ":")) if isinstance(plain, dict | list) else plain


def _plain(value: Any) -> Any:
    """A value in JSON's types."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value
