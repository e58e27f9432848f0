"""Opens a database without write permission: no locks, no repair, no replay of logs.

Rows that are still in a write-ahead log are read from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from llm_sidecar.db.lance import one_line
from llm_sidecar.db.location import Location
from llm_sidecar.db.log import Row, read_segment, segments
from llm_sidecar.db.rows import KEYS, ROW_ID
from llm_sidecar.db.schema import arrow_schemas, upgraded
from llm_sidecar.db.tables import Tables, open_tables
from llm_sidecar.errors import DatabaseUnavailable

_OPEN_SECONDS: Final = 60.0
_KEYS_PER_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class LoggedRows:
    """Rows that are still in write-ahead logs.

    Attributes:
        rows: rows that are not in their tables yet, by table, oldest first.
        unreadable: whether some log could not be read.
    """

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: bool = False

    def count(self) -> int:
        """The number of rows of all tables."""
        return sum(map(len, self.rows.values()))


@contextlib.asynccontextmanager
async def opened_read_only(location: Location) -> AsyncIterator[tuple[Tables, LoggedRows]]:
    """The tables, and the rows that are not in them yet.

    Raises:
        DatabaseUnavailable: the database cannot be opened, with the reason.
    """
    try:
        async with asyncio.timeout(_OPEN_SECONDS):
            # Reads the logs first: a row that moves to its table meanwhile is then in the table.
            logged, unreadable = await asyncio.to_thread(_read_logs, location)
            tables = await open_tables(location, create=False, write=False)
    except DatabaseUnavailable:
        raise
    except TimeoutError:
        raise _unavailable(location, f"it took longer than {_OPEN_SECONDS:g} s") from None
    except Exception as error:  # noqa: BLE001 lancedb raises many types
        raise _unavailable(location, getattr(error, "strerror", None) or one_line(error)) from None
    try:
        yield tables, LoggedRows(await _not_stored(tables, logged), unreadable)
    finally:
        await tables.close()


def _unavailable(location: Location, why: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"The database at {location.shown} cannot be opened: {why}; check LANCEDB_URI."
    )


def _read_logs(location: Location) -> tuple[list[Row], bool]:
    """The rows of all logs, and whether some log could not be read."""
    rows: list[Row] = []
    unreadable = False
    try:
        folders = [path for path in sorted(location.log_folder.iterdir()) if path.is_dir()]
    except FileNotFoundError:
        return [], False
    except OSError:
        return [], True
    for folder in folders:
        if folder == location.set_aside:
            continue
        try:
            for segment in segments(folder):
                with contextlib.suppress(FileNotFoundError):
                    rows += read_segment(segment).rows
        except FileNotFoundError:
            continue
        except OSError:
            unreadable = True
    return rows, unreadable


async def _not_stored(tables: Tables, logged: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    by_table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in logged:
        values = upgraded(row.table, row.values)
        if values is not None:
            by_table[row.table].setdefault(values[KEYS[row.table]], values)
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
