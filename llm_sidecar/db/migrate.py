"""Migrates the tables of older versions, and creates missing tables.

Each table is rewritten in one commit, so that it is either old or new. A local table is first
copied to the folder of files that are set aside.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.lance import connect
from llm_sidecar.db.location import Location
from llm_sidecar.db.old_shapes import Converter
from llm_sidecar.db.rows import TABLES
from llm_sidecar.db.schema import (
    VERSION,
    is_current,
    new_table_schema,
    require_not_newer,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal.locks import dated, locked


async def migrate(location: Location, progress: Callable[[str], None]) -> AsyncIterator[str]:
    """Migrates every table that is not of the current version.

    Yields the result of each table, in words, as soon as the table is migrated: a later one may
    fail.

    Args:
        progress: called with the progress, in words.

    Raises:
        DatabaseUnavailable: other processes use the database; nothing is changed.
        FileNotFoundError: there is no database.
        Exception: whatever lancedb raises; the current table is unchanged.
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
                # If the database has no note yet, all its tables count as synced.
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
                    # Readers do not create tables, so they would fail without this one.
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
    converter = Converter(name)
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
    kept = dated(location.set_aside, f"{name}-before-migration.lance")
    try:
        shutil.copytree(location.folder / f"{name}.lance", kept)
    except BaseException:
        # An incomplete copy would only occupy space, which may be what is missing.
        shutil.rmtree(kept, ignore_errors=True)
        raise
    return f"; the old table is kept as {kept.name}"
