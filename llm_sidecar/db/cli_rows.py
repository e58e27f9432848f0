"""The output formats of the command line: a table for people, the others for programs."""

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
"""A spreadsheet treats text that begins with one of these as a formula."""


def as_jsonl(rows: Iterable[Row]) -> str:
    """One JSON object per line, in ASCII."""
    return "".join(f"{json.dumps(_plain(row), allow_nan=False)}\n" for row in rows)


def as_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """CSV of RFC 4180: a header, quotes where needed, lines that end in CR LF. Objects are JSON
    text.

    A spreadsheet would run text that begins like a formula, so `'` is put before such text.
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
        table: the table of the rows; None for rows of no table.
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
    """Lines for a terminal: a table if it is wide enough, otherwise a block of lines for each row.

    Control characters are escaped.

    Args:
        width: width of the terminal, in cells.
        wide: whether long values are not shortened, however long the lines get.
        encoding: encoding of the terminal.
    """
    # Imported here, because only this format needs rich.
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
    # Stored text must not send control sequences to the terminal.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    plain = _plain(value)
    return json.dumps(plain, separators=(",", ":")) if isinstance(plain, dict | list) else plain


def _plain(value: Any) -> Any:
    """The value as JSON types."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value
