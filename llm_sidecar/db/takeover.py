"""Rows that a process which has died left in its log, and their way into the tables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from llm_sidecar.db import log as wal
from llm_sidecar.db.log import Row
from llm_sidecar.db.place import Place
from llm_sidecar.db.schema import upgraded
from llm_sidecar.db.tables import Tables

_LOOK_AGAIN: Final = 0.02

Insert = Callable[[Sequence[Row]], Awaitable[None]]
"""Stores rows of which some may be in their tables already."""


async def take_over(
    place: Place, tables: Tables, insert: Insert, note: Callable[[str], None], *, wait: bool
) -> None:
    """Stores the rows of processes that have died.

    Rows of older versions get the columns that they lack. Rows that no version knows, and damaged
    ones, are set aside.

    Args:
        insert: into these tables.
        note: is told what was done, in words.
        wait: False to leave it, this time, to another process that is just looking too.
    """
    while (found := await asyncio.to_thread(wal.abandoned_logs, place.log_folder)) is None:
        if not wait:
            return
        await asyncio.sleep(_LOOK_AGAIN)
    try:
        for abandoned in found:
            await _take_over(place, tables, insert, note, abandoned)
    finally:
        for abandoned in found:
            abandoned.release()


async def _take_over(
    place: Place,
    tables: Tables,
    insert: Insert,
    note: Callable[[str], None],
    abandoned: wal.AbandonedLog,
) -> None:
    count = 0
    for path in wal.segments(abandoned.folder):
        segment = await asyncio.to_thread(wal.read_segment, path)
        rows = [
            Row(row.table, values)
            for row in segment.rows
            if (values := upgraded(row.table, row.values)) is not None
        ]
        await insert(rows)
        count += len(rows)
        if unknown := len(segment.rows) - len(rows):
            kept = await asyncio.to_thread(_set_aside, path, place.set_aside)
            note(
                f"a log has {unknown} rows of another version of the sidecar; it is kept as {kept}"
            )
        elif segment.damaged:
            kept = await asyncio.to_thread(_set_aside, path, place.set_aside)
            note(f"{segment.damaged} bytes of a log are damaged; it is kept as {kept}")
    if count:
        await tables.sync()
        note(f"{count} rows of a process that has ended were replayed")
    await asyncio.to_thread(abandoned.remove)


def _set_aside(path: Path, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{path.parent.name}-{path.name}"
    path.replace(kept)
    return kept.name
