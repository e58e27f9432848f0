"""Conversion of rows of older table shapes to the current one.

Older tables have timestamps as text, as numbers or without a time zone, objects that are not text,
and fewer columns.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Final

from llm_sidecar.db.rows import FEEDBACK, FEEDBACK_ID, KEYS, feedback_key
from llm_sidecar.db.schema import ADDED, arrow_schemas

_NO_TIME: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NO_SCORE: Final = -1.0
"""The score of a failed scoring in every version."""
_DEFAULTS: Final = {"schema_version": "1.0"}
_MILLISECONDS, _MICROSECONDS, _NANOSECONDS = 1e11, 1e14, 1e17
"""From these numbers on, a time since 1970 has that unit. Smaller numbers are seconds."""
_DATE_DIGITS: Final = 8
"""The number of digits of a date such as 20260131."""


class Converter:
    """Converts the rows of one table.

    Attributes:
        count: the number of converted rows.
    """

    def __init__(self, table: str) -> None:
        self.count = 0
        self._table = table
        self._schema = arrow_schemas()[table]
        self._added = ADDED.get(table, {})
        # The key of version 2.
        self._key_column = FEEDBACK_ID if table == FEEDBACK else KEYS[table]
        self._seen: set[str] = set()
        self._without_time = 0

    def convert(self, batch: Any) -> Any:
        """Converts an Arrow record batch of an older shape to the current schema."""
        import pyarrow as pa

        # Dropped columns are not read, because Python may lack their types.
        columns = {
            name: _values(batch.column(name))
            for name in self._schema.names
            if name in batch.schema.names
        }
        rows = [
            self._row({name: values[number] for name, values in columns.items()})
            for number in range(batch.num_rows)
        ]
        return pa.RecordBatch.from_pylist(rows, schema=self._schema)

    def _row(self, old: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in self._added if old.get(name) is None]
        row = {
            field.name: self._value(field, old.get(field.name))
            for field in self._schema
            if field.name not in missing
        }
        row[self._key_column] = self._key(old, row)
        row |= {name: self._added[name](row) for name in missing}
        self.count += 1
        return row

    def _value(self, field: Any, value: Any) -> Any:
        import pyarrow as pa

        if pa.types.is_timestamp(field.type):
            return self._time(value)
        if pa.types.is_floating(field.type):
            value = _number_or_none(value)
        elif pa.types.is_string(field.type):
            value = _text_or_none(value)
        if value is not None or field.nullable:
            return value
        if pa.types.is_struct(field.type):
            return {}
        return _NO_SCORE if pa.types.is_floating(field.type) else _DEFAULTS.get(field.name, "")

    def _time(self, value: Any) -> datetime.datetime:
        found = _time_of(value)
        self._without_time += found is None
        return found or _NO_TIME

    def _key(self, old: dict[str, Any], row: dict[str, Any]) -> str:
        """The key of the row, or the default key of feedback; a new key for a duplicate, so that no
        row is lost."""
        key = old.get(self._key_column)
        if not key and self._table == FEEDBACK:
            key = feedback_key(row)
        if not key or key in self._seen:
            key = uuid.uuid4().hex
        self._seen.add(key)
        return str(key)

    def notes(self, old: Any) -> str:
        """Describes the added and dropped columns, and the number of rows without a time.

        Args:
            old: the Arrow schema of the table before.
        """
        added = _joined(name for name in self._schema.names if name not in old.names)
        dropped = _joined(name for name in old.names if name not in self._schema.names)
        notes = [f"with {added} added"] if added else []
        notes += [f"without {dropped}"] if dropped else []
        if self._without_time:
            notes.append(f"{self._without_time} of them, without a readable time, now of 1970")
        return "".join(f", {note}" for note in notes)


def _joined(names: Iterable[str]) -> str:
    return " and ".join(names)


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column. Times become microseconds since 1970, because Python's times
    lack nanoseconds and have fewer years."""
    import pyarrow as pa

    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        return list(column.to_pylist())
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    return [
        None if ticks is None else _Microseconds(ticks * 10**6 // per_second)
        for ticks in column.cast(pa.int64()).to_pylist()
    ]


class _Microseconds(int):
    """Microseconds since 1970 in UTC: a time whose unit is known."""


def _text_or_none(value: Any) -> str | None:
    """Text unchanged, an object as JSON text; None for null and for an object of nulls."""
    if isinstance(value, str):
        return value
    value = _without_nulls(value)
    return None if value in (None, {}) else json.dumps(value, separators=(",", ":"), default=str)


def _without_nulls(value: Any) -> Any:
    """Removes the nulls that a struct column adds: there every object has the keys of all objects,
    with null or, from pandas, NaN for its missing ones."""
    if isinstance(value, dict):
        whole = {name: _without_nulls(inner) for name, inner in value.items()}
        return {name: inner for name, inner in whole.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time_of(value: Any) -> datetime.datetime | None:
    """A time in UTC; a naive one counts as UTC. None if the value is not a time."""
    for found in _times(value):
        try:
            if found.tzinfo is None:
                return found.replace(tzinfo=datetime.UTC)
            return found.astimezone(datetime.UTC)
        except OverflowError:
            continue
    return None


def _times(value: Any) -> Iterator[datetime.datetime]:
    with contextlib.suppress(OverflowError, ValueError):
        if isinstance(value, _Microseconds):
            yield _NO_TIME + datetime.timedelta(microseconds=value)
            return
        number = _number_or_none(value)
        # Text of eight digits is a date; any other number is a time since 1970.
        text = value.strip() if isinstance(value, str) else ""
        if number is None or len(text) == _DATE_DIGITS:
            yield datetime.datetime.fromisoformat(text)
        else:
            yield _NO_TIME + datetime.timedelta(seconds=number / _per_second(number))


def _per_second(number: float) -> float:
    for least, unit in ((_NANOSECONDS, 1e9), (_MICROSECONDS, 1e6), (_MILLISECONDS, 1e3)):
        if abs(number) >= least:
            return unit
    return 1.0


def _number_or_none(value: Any) -> float | None:
    """A finite number, also from text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
