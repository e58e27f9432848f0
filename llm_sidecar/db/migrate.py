"""Bringing tables of older shapes to today's: string or naive timestamps, columns that were not
there yet, objects that were not text. A table that is not there at all is created.

Each table is rewritten in one commit, so that it is either old or new, never half of each. A local
one is copied to the files that are set aside before.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Final

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.lance import connect
from llm_sidecar.db.location import Location
from llm_sidecar.db.log import locked
from llm_sidecar.db.rows import FEEDBACK, FEEDBACK_ID, KEYS, TABLES, feedback_key
from llm_sidecar.db.schema import (
    ADDED,
    VERSION,
    arrow_schemas,
    is_current,
    new_table_schema,
    require_not_newer,
)
from llm_sidecar.errors import DatabaseUnavailable

_NO_TIME: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NO_SCORE: Final = -1.0
"""What the score of a failed scoring has always been."""
_DEFAULTS: Final = {"schema_version": "1.0"}
_MILLISECONDS, _MICROSECONDS, _NANOSECONDS = 1e11, 1e14, 1e17
"""Numbers from these on are times since 1970 in that unit, smaller ones seconds."""
_DATE_DIGITS: Final = 8
"""Of a date such as 20260131."""


async def migrate(location: Location, progress: Callable[[str], None]) -> AsyncIterator[str]:
    """Migrates every table that needs it; may run as often as one likes.

    Gives what was done, a line a table, as soon as it is done: a later table may fail.

    Args:
        progress: is told now and then how far it is.

    Raises:
        DatabaseUnavailable: other processes use the database; nothing is changed.
        FileNotFoundError: there is no database.
        Exception: whatever lancedb raises; the table at hand is as it was.
    """
    connection = await connect(location, create=False)
    try:
        with locked(location.log_folder / "alive.lock", wait=False) as alone:
            if not alone:
                raise DatabaseUnavailable(
                    "Another process uses the database; stop it and migrate again."
                )
            names = set((await connection.list_tables()).tables)
            if location.folder is not None:
                # Of a database that has no note yet, what is there counts as synced.
                Disk(location).adopt(
                    {
                        name: int(await (await connection.open_table(name)).version())
                        for name in TABLES
                        if name in names
                    }
                )
            for name in TABLES:
                if name in names:
                    yield await _migrate_table(location, connection, name, progress)
                else:
                    # Readers create no tables, so without this one they would fail.
                    schema = new_table_schema(name)
                    await _sync(location, await connection.create_table(name, schema=schema))
                    yield f"{name}: created, as it was not there."
    finally:
        connection.close()


async def _migrate_table(
    location: Location, connection: Any, name: str, progress: Callable[[str], None]
) -> str:
    import pyarrow as pa

    table, schema = await connection.open_table(name), new_table_schema(name)
    old = await table.schema()
    require_not_newer(name, old)
    if is_current(name, old):
        return f"{name}: nothing to do, {await table.count_rows()} rows are of version {VERSION}."
    converter = _Converter(name)
    batches = []
    async for batch in await table.query().to_batches():
        batches.append(converter.convert(batch))
        progress(f"{name}: {converter.count} rows")
    kept = _keep_copy(location, name)
    reader = pa.RecordBatchReader.from_batches(schema, iter(batches))
    new = await connection.create_table(name, data=reader, schema=schema, mode="overwrite")
    await _sync(location, new)
    return (
        f"{name}: {converter.count} rows brought to version {VERSION}{converter.notes(old)}{kept}."
    )


async def _sync(location: Location, table: Any) -> None:
    if location.folder is not None:
        Disk(location).sync({table.name: int(await table.version())})


def _keep_copy(location: Location, name: str) -> str:
    if location.folder is None:
        return ""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    kept = location.set_aside / f"{stamp}-{name}-before-migration.lance"
    try:
        shutil.copytree(location.folder / f"{name}.lance", kept)
    except BaseException:
        # Half a copy only takes up the space that is missing.
        shutil.rmtree(kept, ignore_errors=True)
        raise
    return f"; the old table is kept as {kept.name}"


class _Converter:
    """Turns rows of any older shape of one table into today's."""

    def __init__(self, table: str) -> None:
        self.count = 0
        self._table = table
        self._schema = arrow_schemas()[table]
        self._added = ADDED.get(table, {})
        # The key in version 2.
        self._key_column = FEEDBACK_ID if table == FEEDBACK else KEYS[table]
        self._seen: set[str] = set()
        self._without_time = 0

    def convert(self, batch: Any) -> Any:
        """A batch of today's shape from one of an older."""
        import pyarrow as pa

        # Columns that are to go may hold what Python has no type for, so they are left alone.
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
        """The key that is there, or the one that today's code would give; a new one for a row whose
        key another has, as no row is to be lost."""
        key = old.get(self._key_column)
        if not key and self._table == FEEDBACK:
            key = feedback_key(row)
        if not key or key in self._seen:
            key = uuid.uuid4().hex
        self._seen.add(key)
        return str(key)

    def notes(self, old: Any) -> str:
        """What else there is to say of a table whose Arrow schema was `old`."""
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
    """The values of an Arrow column. Times become numbers of microseconds since 1970: Python's
    have no nanoseconds, and not every year that Arrow has."""
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
    """Since 1970, in UTC; a number whose unit need not be guessed."""


def _text_or_none(value: Any) -> str | None:
    """Text as it is, an object as JSON text; None where there is none, or an object of nulls."""
    if isinstance(value, str):
        return value
    value = _without_nulls(value)
    return None if value in (None, {}) else json.dumps(value, separators=(",", ":"), default=str)


def _without_nulls(value: Any) -> Any:
    """What a struct column's writer gave it: in such a column every object has the keys of all,
    those that it did not bring as nulls or, from pandas, as NaN."""
    if isinstance(value, dict):
        whole = {name: _without_nulls(inner) for name, inner in value.items()}
        return {name: inner for name, inner in whole.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time_of(value: Any) -> datetime.datetime | None:
    """A time in UTC; a naive one counts as UTC. None where it is no time."""
    for found in _readings(value):
        try:
            if found.tzinfo is None:
                return found.replace(tzinfo=datetime.UTC)
            return found.astimezone(datetime.UTC)
        except OverflowError:
            continue
    return None


def _readings(value: Any) -> Iterator[datetime.datetime]:
    with contextlib.suppress(OverflowError, ValueError):
        if isinstance(value, _Microseconds):
            yield _NO_TIME + datetime.timedelta(microseconds=value)
            return
        number = _number_or_none(value)
        # A text of eight digits is a date, any other number a time since 1970.
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
    """A number, also one that is written as text; None for what is none, NaN included."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
