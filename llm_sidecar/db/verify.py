"""Reads every row, to check that it can be read and that its key is unique."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_sidecar.db.queries import stream
from llm_sidecar.db.rows import KEYS, TABLES
from llm_sidecar.db.schema import arrow_schemas
from llm_sidecar.db.tables import Tables


@dataclass(slots=True)
class Verified:
    """The result for one table.

    Attributes:
        rows: rows that were read.
        expected: rows that the table should have, according to its metadata.
        duplicates: rows whose key an earlier row has.
    """

    table: str
    rows: int = 0
    expected: int = 0
    duplicates: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether every row was read, and no key twice."""
        return self.rows == self.expected and not self.duplicates


async def verify(tables: Tables, progress: Callable[[str], None]) -> list[Verified]:
    """Reads every column of every row, and counts duplicate keys.

    Args:
        progress: called with the progress, in words.

    Raises:
        Exception: whatever lancedb raises for rows that cannot be read.
    """
    found = []
    for name in TABLES:
        result = Verified(name, expected=await tables[name].count_rows())
        seen: set[str] = set()
        async for batch in stream(tables, name, columns=arrow_schemas()[name].names):
            keys = batch[KEYS[name]]
            result.rows += len(keys)
            seen.update(keys)
            progress(f"{name}: {result.rows} of {result.expected} rows")
        result.duplicates = result.rows - len(seen)
        found.append(result)
    return found
