"""Opens a database without write permission: no locks, no repair, no moving of rows.

Rows that are still in the journal are read from the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llm_sidecar.db.encoding import values_of
from llm_sidecar.db.lance import one_line
from llm_sidecar.db.location import Location
from llm_sidecar.db.rows import KEYS, ROW_ID
from llm_sidecar.db.schema import arrow_schemas
from llm_sidecar.db.tables import Tables, open_tables
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal.file import NAME, require_files

_OPEN_SECONDS: Final = 60.0
_KEYS_PER_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class JournalRows:
    """Rows that are still in the journal.

    Attributes:
        rows: rows that are not in their tables yet, by table, oldest first.
        unreadable: whether the journal could not be read.
    """

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: bool = False

    def count(self) -> int:
        """The number of rows of all tables."""
        return sum(map(len, self.rows.values()))


@contextlib.asynccontextmanager
async def opened_read_only(location: Location) -> AsyncIterator[tuple[Tables, JournalRows]]:
    """The tables, and the rows that are not in them yet.

    Raises:
        DatabaseUnavailable: the database cannot be opened, with the reason.
    """
    try:
        async with asyncio.timeout(_OPEN_SECONDS):
            # Reads the journal before the tables, so that a row that moves in between is not
            # missed.
            waiting, unreadable = await asyncio.to_thread(_read_journal, location)
            tables = await open_tables(location, create=False, write=False)
    except DatabaseUnavailable:
        raise
    except TimeoutError:
        raise _unavailable(location, f"it took longer than {_OPEN_SECONDS:g} s") from None
    except Exception as error:  # noqa: BLE001 lancedb raises many types
        raise _unavailable(location, getattr(error, "strerror", None) or one_line(error)) from None
    try:
        yield tables, JournalRows(await _not_stored(tables, waiting), unreadable)
    finally:
        await tables.close()


def _unavailable(location: Location, why: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"The database at {location.shown} cannot be opened: {why}; check LANCEDB_URI."
    )


def _read_journal(location: Location) -> tuple[list[tuple[str, bytes]], bool]:
    """The table and columns of every row except drafts, and whether the journal is unreadable."""
    path = location.log_folder / NAME
    try:
        require_files(location.log_folder)
        if not path.exists():
            return [], False
        # Without an open process there is no `-wal` file, and a read-only SQLite cannot create one.
        alone = "" if Path(f"{path}-wal").exists() else "&immutable=1"
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro{alone}", uri=True)) as db:
            return db.execute("SELECT target, data FROM rows WHERE draft IS NULL").fetchall(), False
    except (sqlite3.Error, OSError):
        return [], True


async def _not_stored(
    tables: Tables, waiting: Iterable[tuple[str, bytes]]
) -> dict[str, list[dict[str, Any]]]:
    by_table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for table, data in waiting:
        values = values_of(table, data)
        if values is not None:
            by_table[table][values[KEYS[table]]] = values
    found = {}
    for table, rows in by_table.items():
        stored = await _stored_keys(tables, table, list(rows))
        left = [_shown(table, values) for key, values in rows.items() if key not in stored]
        if left:
            found[table] = left
    return found


async def _stored_keys(tables: Tables, table: str, keys: list[str]) -> set[str]:
    from lancedb.expr import col

    name, found = KEYS[table], set()
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        condition = col(name).isin(keys[start : start + _KEYS_PER_QUERY])
        query = tables[table].query().where(condition).select([name])
        found |= {row[name] for row in await query.to_list()}
    return found


def _shown(table: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in arrow_schemas()[table].names if name != ROW_ID}
