"""Replay: moves the rows in the logs of dead processes to the tables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from llm_sidecar.db import log as wal
from llm_sidecar.db.location import Location
from llm_sidecar.db.log import Row
from llm_sidecar.db.schema import upgraded
from llm_sidecar.db.tables import Tables

_RETRY_SECONDS: Final = 0.02

Insert = Callable[[Sequence[Row]], Awaitable[None]]
"""Stores rows, some of which may already be in their tables."""


async def replay(
    location: Location,
    tables: Tables,
    insert: Insert,
    note: Callable[[str], None],
    *,
    wait: bool,
) -> None:
    """Stores the logged rows of dead processes.

    Rows of older versions get the columns that they lack. A log with damaged rows, or with rows of
    an unknown version, is set aside.

    Args:
        insert: stores rows in `tables`.
        note: called with each result, in words.
        wait: False to return at once if another process is replaying.
    """
    while (found := await asyncio.to_thread(wal.abandoned_logs, location.log_folder)) is None:
        if not wait:
            return
        await asyncio.sleep(_RETRY_SECONDS)
    try:
        for abandoned in found:
            await _replay_log(location, tables, insert, note, abandoned)
    finally:
        for abandoned in found:
            abandoned.release()


async def _replay_log(
    location: Location,
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
            kept = await asyncio.to_thread(_set_aside, path, location.set_aside)
            note(
                f"a log has {unknown} rows of another version of the sidecar; it is kept as {kept}"
            )
        elif segment.damaged:
            kept = await asyncio.to_thread(_set_aside, path, location.set_aside)
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
