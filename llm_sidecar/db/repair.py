"""Repairs a local database after a crash: sets unreadable versions of tables aside.

Their rows are not lost: rows that are not synced to the tables are still in the journal.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import Any, Final

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.lance import build_indices, delete_old_versions, merge_fragments, one_line

log = logging.getLogger(__name__)

_MACHINE_ERRORS: Final = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EROFS,
)


class Repair:
    """One repair; no other process has the database open meanwhile.

    Attributes:
        done: what was done, in words.
    """

    def __init__(self, disk: Disk, connection: Any) -> None:
        self.done: list[str] = []
        self._disk = disk
        self._connection = connection

    async def run(self) -> None:
        """Repairs every table.

        Raises:
            Exception: an error of the machine, such as a full disk. It is not the table's fault, so
                no version is set aside.
        """
        tables = await asyncio.to_thread(self._disk.tables)
        synced = await asyncio.to_thread(self._disk.synced_versions)
        newest: dict[str, int] = {}
        for name in tables:
            version = await self._first_readable(name, synced)
            if version:
                newest[name] = version
        await asyncio.to_thread(self._disk.adopt, newest)

    async def _first_readable(self, name: str, synced: dict[str, int] | None) -> int:
        """Sets unreadable versions aside until one is readable; 0 if none is left.

        Reads a version completely only if it may not be synced.
        """
        intact = True
        while name in await asyncio.to_thread(self._disk.tables):
            try:
                expected = await asyncio.to_thread(self._disk.newest_version, name)
                table = await self._connection.open_table(name)
                version = int(await table.version())
                if version != expected:
                    # lancedb reads a manifest of zeros as an empty one of version 0.
                    raise ValueError(f"it says that it is version {version}")
                unclean = synced is not None and version > synced.get(name, 0)
                if unclean:
                    await _read_whole(table)
            except Exception as error:
                if _is_machine_error(error):
                    raise
                done = await asyncio.to_thread(self._disk.set_newest_aside, name)
                log.error("%s (%s)", done, one_line(error))
                self.done.append(done)
                intact = False
            else:
                if unclean:
                    await self._set_torn_aside(name)
                    await self._tidy(table, intact)
                return int(await table.version())
        return 0

    async def _set_torn_aside(self, name: str) -> None:
        """Sets truncated older versions aside, because each would make cleanup fail."""
        for done in await asyncio.to_thread(self._disk.set_torn_aside, name):
            log.error("%s", done)
            self.done.append(done)

    async def _tidy(self, table: Any, intact: bool) -> None:
        """Rebuilds the indices of a table, which may be corrupt, and deletes incomplete files.

        Args:
            intact: whether no version was set aside. Otherwise the files of that version are kept.
        """
        try:
            await build_indices(table, again=True)
            if intact:
                await merge_fragments(table)
                versions = {table.name: int(await table.version())}
                await asyncio.to_thread(self._disk.sync, versions)
                await delete_old_versions(table, unverified=True)
        except Exception as error:  # noqa: BLE001 the rows are readable, and that is what counts
            failed = f"{table.name}: tidying up after a crash failed: {one_line(error)}"
            log.error("%s", failed)
            self.done.append(failed)


async def _read_whole(table: Any) -> None:
    async for _ in await table.query().to_batches():
        pass


def _is_machine_error(error: Exception) -> bool:
    """Whether the error is the machine's, such as a full disk, and not the file's."""
    text = str(error)
    return any(os.strerror(number) in text for number in _MACHINE_ERRORS)
