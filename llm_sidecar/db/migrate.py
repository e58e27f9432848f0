"""Bringing tables of older shapes to today's: string or naive timestamps, columns that were not
there yet, objects that were not text.

Each table is rewritten in one commit, so that it is either old or new, never half of each. A local
one is copied to the files that are set aside before.
"""

from __future__ import annotations

import datetime
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.log import locked
from llm_sidecar.db.place import Place
from llm_sidecar.db.schema import (
    FEEDBACK,
    KEYS,
    TABLES,
    VERSION,
    arrow_schemas,
    feedback_key,
    is_current,
)
from llm_sidecar.db.tables import connect
from llm_sidecar.errors import DatabaseUnavailable

_NO_TIME: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NO_SCORE: Final = -1.0
"""What the score of a failed scoring has always been."""
_DEFAULTS: Final = {"schema_version": "1.0"}
_MILLISECONDS, _MICROSECONDS, _NANOSECONDS = 1e11, 1e14, 1e17
"""Numbers from these on are times since 1970 in that unit, smaller ones seconds."""


async def migrate(place: Place, progress: Callable[[str], None]) -> list[str]:
    """Migrates every table that needs it; may run as often as one likes.

    Args:
        progress: is told now and then how far it is.

    Returns:
        What was done, a line a table.

    Raises:
        DatabaseUnavailable: other processes use the database; nothing is changed.
        FileNotFoundError: there is no database.
        Exception: whatever lancedb raises; the table at hand is as it was.
    """
    connection = await connect(place, create=False)
    try:
        with locked(place.log_folder / "alive.lock", wait=False) as alone:
            if not alone:
                raise DatabaseUnavailable(
                    "Another process uses the database; stop it and migrate again."
                )
            names = set((await connection.list_tables()).tables)
            return [
                await _migrate_table(place, connection, name, progress)
                for name in TABLES
                if name in names
            ]
    finally:
        connection.close()


async def _migrate_table(
    place: Place, connection: Any, name: str, progress: Callable[[str], None]
) -> str:
    import pyarrow as pa

    table, schema = await connection.open_table(name), arrow_schemas()[name]
    old = await table.schema()
    if is_current(name, old):
        return f"{name}: nothing to do, {await table.count_rows()} rows are of version {VERSION}."
    converter = _Converter(name)
    batches = []
    async for batch in await table.query().to_batches():
        rows = [converter.convert(row) for row in batch.to_pylist()]
        batches.append(pa.RecordBatch.from_pylist(rows, schema=schema))
        progress(f"{name}: {converter.count} rows")
    kept = _keep_copy(place, name)
    reader = pa.RecordBatchReader.from_batches(schema, iter(batches))
    new = await connection.create_table(name, data=reader, schema=schema, mode="overwrite")
    if place.folder is not None:
        Disk(place).sync({name: int(await new.version())})
    return (
        f"{name}: {converter.count} rows brought to version {VERSION}{converter.notes(old)}{kept}."
    )


def _keep_copy(place: Place, name: str) -> str:
    if place.folder is None:
        return ""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    kept = place.set_aside / f"{stamp}-{name}-before-migration.lance"
    shutil.copytree(place.folder / f"{name}.lance", kept)
    return f"; the old table is kept as {kept.name}"


class _Converter:
    """Turns rows of any older shape of one table into today's."""

    def __init__(self, table: str) -> None:
        self.count = 0
        self._table = table
        self._schema = arrow_schemas()[table]
        self._seen: set[str] = set()
        self._without_time = 0

    def convert(self, old: dict[str, Any]) -> dict[str, Any]:
        row = {field.name: self._value(field, old.get(field.name)) for field in self._schema}
        row[KEYS[self._table]] = self._key(old, row)
        self.count += 1
        return row

    def _value(self, field: Any, value: Any) -> Any:
        import pyarrow as pa

        if field.name == "timestamp":
            return self._time(value)
        if value is None:
            if field.nullable or pa.types.is_struct(field.type):
                return None if field.nullable else {}
            return _NO_SCORE if pa.types.is_floating(field.type) else _DEFAULTS.get(field.name, "")
        if pa.types.is_floating(field.type):
            return float(value)
        if pa.types.is_string(field.type) and not isinstance(value, str):
            return json.dumps(value, separators=(",", ":"), default=str)
        return value

    def _time(self, value: Any) -> datetime.datetime:
        found = _time_of(value)
        self._without_time += found is None
        return found or _NO_TIME

    def _key(self, old: dict[str, Any], row: dict[str, Any]) -> str:
        """The key that is there, or the one that today's code would give; a new one for a row whose
        key another has, as no row is to be lost."""
        key = old.get(KEYS[self._table])
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
    if isinstance(value, datetime.datetime):
        yield value
    if isinstance(value, str):
        try:
            yield datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            value = _number_or_none(value)
    if isinstance(value, int | float):
        for least, unit in ((_NANOSECONDS, 1e9), (_MICROSECONDS, 1e6), (_MILLISECONDS, 1e3)):
            if abs(value) >= least:
                value /= unit
                break
        try:
            yield _NO_TIME + datetime.timedelta(seconds=value)
        except (OverflowError, ValueError):
            return


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
