"""Reads the write-ahead logs of versions before the journal into the journal.

Such a log is a folder of segments, with a `lock` file that its process keeps locked until it ends.
A segment is a sequence of records: a marker, the length and the CRC-32 of the payload
(little-endian), and the payload, the JSON text `[table, {column: value}]`. A record that a crash
has truncated was never acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from llm_sidecar.db.encoding import encoded, values_of
from llm_sidecar.db.location import Location
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.locks import dated, held
from llm_sidecar.journal.rows import Entry

_MARKER: Final = b"\xf5ROW"
"""Its first byte never occurs in UTF-8, so no payload contains the marker."""
_HEADER: Final = struct.Struct("<4sII")
_LOCK: Final = "lock"
_AT_ONCE: Final = 2000
_AGAIN_SECONDS: Final = 30.0
"""Seconds between two searches for logs of processes that have ended."""


class Segment(NamedTuple):
    """The content of a segment.

    Attributes:
        entries: the rows, which may be in their tables already.
        unknown: the number of rows of another version of the sidecar.
        damaged: the number of bytes before the last intact record that are not a record.
    """

    entries: list[Entry]
    unknown: int
    damaged: int


def read_segment(path: Path) -> Segment:
    """The rows of a segment."""
    data = path.read_bytes()
    entries, unknown, damaged, good = [], 0, 0, 0
    for start, end in _records(data):
        damaged += start - good
        good = end
        table, values = json.loads(data[start + _HEADER.size : end])
        whole = values_of(table, json.dumps(values).encode())
        if whole is None:
            unknown += 1
        else:
            entries.append(encoded(table, whole, again=True))
    return Segment(entries, unknown, damaged)


def _records(data: bytes) -> Iterator[tuple[int, int]]:
    """The start and end of each intact record."""
    position = 0
    while (start := data.find(_MARKER, position)) >= 0:
        position = start + 1
        if len(data) - start < _HEADER.size:
            return
        _, length, checksum = _HEADER.unpack_from(data, start)
        end = start + _HEADER.size + length
        if end <= len(data) and zlib.crc32(data[start + _HEADER.size : end]) == checksum:
            yield start, end
            position = end


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


class OldLogs:
    """The old logs of one database."""

    def __init__(self, location: Location, journal: Journal, note: Callable[[str], None]) -> None:
        """Reads nothing yet.

        Args:
            note: called with each result, in words.
        """
        self._location = location
        self._journal = journal
        self._note = note
        self._next = -_AGAIN_SECONDS

    async def read(self, *, wait: bool = False) -> None:
        """Reads the logs of processes that have ended, then removes them.

        Repeats this from time to time, because a process of an older version may still run.

        Args:
            wait: whether to wait for another process that is reading them.
        """
        if time.monotonic() < self._next:
            return
        if await asyncio.to_thread(self._folders):
            # Processes of older versions hold it too while they create and remove folders.
            async with held(self._location.log_folder / _LOCK, wait=wait) as mine:
                if not mine:
                    return
                for folder in await asyncio.to_thread(self._folders):
                    async with held(folder / _LOCK, wait=False) as has_ended:
                        if has_ended:
                            await self._read(folder)
        self._next = time.monotonic() + _AGAIN_SECONDS

    def _folders(self) -> list[Path]:
        logs = self._location.log_folder
        return [path for path in sorted(logs.iterdir()) if (path / _LOCK).is_file()]

    async def _read(self, folder: Path) -> None:
        count = 0
        for path in await asyncio.to_thread(_segments, folder):
            if not path.is_file():
                self._keep(path, f"{path.name} in an old log is not a file")
                continue
            segment = await asyncio.to_thread(read_segment, path)
            for start in range(0, len(segment.entries), _AT_ONCE):
                await self._journal.insert(segment.entries[start : start + _AT_ONCE])
            count += len(segment.entries)
            if segment.unknown:
                self._keep(
                    path, f"a log has {segment.unknown} rows of another version of the sidecar"
                )
            elif segment.damaged:
                self._keep(path, f"a log has {segment.damaged} damaged bytes")
            else:
                path.unlink()
        if count:
            self._note(f"{count} rows of an old log were read into the journal")
        await asyncio.to_thread(shutil.rmtree, folder)

    def _keep(self, path: Path, what: str) -> None:
        kept = dated(self._location.set_aside, f"{path.parent.name}-{path.name}")
        path.replace(kept)
        self._note(f"{what}; it is kept as {kept.name}")
