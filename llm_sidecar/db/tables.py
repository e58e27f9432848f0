"""The open tables: opening, writing rows, compacting."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, Final

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.lance import build_indices, connect, delete_old_versions, merge_fragments
from llm_sidecar.db.location import Location
from llm_sidecar.db.repair import Repair
from llm_sidecar.db.rows import FEEDBACK, KEYS, ROW_ID, RUNS, TABLES
from llm_sidecar.db.schema import (
    database_id,
    is_current,
    new_table_schema,
    require_not_newer,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal.locks import held, locked

_LOCK_PAUSE: Final = 0.02
_MOST_KEYS: Final = 500
"""The maximum number of keys in one query."""
FRAGMENTS: Final = 32
"""A table with this many fragments should be compacted."""
COMPACTING: Final = "compact.lock"
"""The lock file of the process that compacts."""
MOVING: Final = "mover.lock"
"""The lock file of the process that adds rows to the tables."""
_COMPACTED: Final = "compacted"
"""A file; its modification time is the time of the last compaction."""
_OLD_SHAPE: Final = (
    "The table {} has the shape of an older version; stop all that uses the database and run "
    "`python -m llm_sidecar.db migrate`."
)


class OldShape(DatabaseUnavailable):
    """A table has the shape of an older version."""


class Tables:
    """The tables of one database, open for reading and writing.

    Attributes:
        repairs: what was repaired on opening, in words.
        database_id: the database's own id, the same for every process that uses it; None if it has
            none.
    """

    def __init__(self, location: Location, connection: Any, *, write: bool) -> None:
        """Use `open_tables`."""
        self.repairs: list[str] = []
        self.database_id: str | None = None
        self._location = location
        self._connection = connection
        # Holds the shared lock as long as a write of this process may be running.
        self._alive = contextlib.ExitStack()
        self._writes: set[asyncio.Task[None]] = set()
        self._disk = Disk(location) if location.folder else None
        self._tables: dict[str, Any] = {}
        self._may_write = write

    def __getitem__(self, name: str) -> Any:
        return self._tables[name]

    async def open_all(self, *, create: bool) -> None:
        """See `open_tables`."""
        opening = held(self._location.log_folder / "opening.lock")
        async with opening if self._may_write else contextlib.nullcontext():
            if self._may_write:
                await self._enter()
            present = (await self._connection.list_tables()).tables
            if not create and not present:
                raise FileNotFoundError("There is no database")
            for name in TABLES:
                await self._open(name, present)
            self.database_id = database_id(await self._tables[FEEDBACK].schema())

    async def _enter(self) -> None:
        """Repairs the database if no other process has it open, then acquires the shared lock."""
        alive = self._location.log_folder / "alive.lock"
        async with held(alive, wait=False) as alone:
            if alone and self._disk is not None:
                repair = Repair(self._disk, self._connection)
                self.repairs = repair.done
                await repair.run()
        # While this holds the shared lock, no other process can repair the database.
        while not self._alive.enter_context(locked(alive, wait=False, shared=True)):
            self._alive.close()
            await asyncio.sleep(_LOCK_PAUSE)

    async def _open(self, name: str, present: Sequence[str]) -> None:
        if name in present:
            self._tables[name] = await self._connection.open_table(name)
        elif self._may_write:
            self._tables[name] = await self._create(name)
        else:
            raise OldShape(
                f"The table {name} is missing; a user with write permission has to run "
                "`python -m llm_sidecar.db migrate`."
            )
        schema = await self._tables[name].schema()
        require_not_newer(name, schema)
        if not is_current(name, schema):
            raise OldShape(_OLD_SHAPE.format(name), retry_after=5)

    async def _create(self, name: str) -> Any:
        try:
            return await self._connection.create_table(name, schema=new_table_schema(name))
        except Exception:
            if name not in (await self._connection.list_tables()).tables:
                raise
            # Another machine has created it at the same time.
            return await self._connection.open_table(name)

    async def add(self, table: str, rows: Any) -> None:
        """Adds the rows of an Arrow table, none of which is in the table yet.

        Raises:
            Exception: whatever lancedb raises.
        """
        await self._complete(self._tables[table].add(rows))

    async def merge(self, table: str, rows: Any) -> None:
        """Adds the rows of an Arrow table whose key is not in the table yet.

        Args:
            rows: at most one row per key; of two rows with the same key, both would be added.

        Raises:
            Exception: whatever lancedb raises.
        """
        merge = self._tables[table].merge_insert([KEYS[table]]).when_not_matched_insert_all()
        await self._complete(merge.execute(rows))

    async def finished(self, run_ids: Iterable[str]) -> list[str]:
        """Which of these runs have the row of a finished run.

        Args:
            run_ids: UUIDs.

        Raises:
            Exception: whatever lancedb raises.
        """
        keys = {uuid.UUID(run_id).hex: run_id for run_id in run_ids}
        found: list[str] = []
        for start in range(0, len(keys), _MOST_KEYS):
            quoted = ", ".join(f"'{key}'" for key in list(keys)[start : start + _MOST_KEYS])
            query = self._tables[RUNS].query().where(f"{ROW_ID} IN ({quoted})").select([ROW_ID])
            found += [keys[row[ROW_ID]] for row in await query.to_list()]
        return found

    async def _complete(self, writing: Coroutine[Any, Any, Any]) -> None:
        """Waits for a write, which runs to completion even if the caller is cancelled.

        lancedb cannot cancel a write, and this process must hold its lock until the write ends.
        """

        async def write() -> None:
            await writing

        task = asyncio.create_task(write())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

    async def sync(self, tables: Iterable[str] = TABLES) -> None:
        """Makes the rows in the tables survive a power loss.

        Raises:
            OSError
        """
        if self._disk is not None:
            versions = {name: int(await self._tables[name].version()) for name in tables}
            await asyncio.to_thread(self._disk.sync, versions)

    async def fragments(self, table: str) -> int:
        """The number of fragments of a table."""
        stats = await self._tables[table].stats()
        return int(stats["fragment_stats"]["num_fragments"])

    async def compact(self) -> bool:
        """Merges small fragments, updates the indices and deletes unused versions.

        Returns:
            False if another process is compacting; does not wait for it.
        """
        done: list[bool] = []

        async def compact() -> None:
            done.append(await self._compact())

        await self._complete(compact())
        return done[0]

    @contextlib.asynccontextmanager
    async def unchanging(self) -> AsyncIterator[None]:
        """Prevents compaction during a long read, because compaction deletes files.

        Without write permission there is no lock. Then a file may be deleted two minutes after the
        read began.
        """
        if not self._may_write:
            yield
            return
        async with held(self._location.log_folder / COMPACTING, shared=True):
            yield

    async def _compact(self) -> bool:
        async with held(self._location.log_folder / COMPACTING, wait=False) as mine:
            if not mine:
                return False
            for table in self._tables.values():
                await table.checkout_latest()
                if await table.count_rows():
                    await build_indices(table)
                await merge_fragments(table)
            # The lock keeps other processes from adding a version that is not synced.
            async with held(self._location.log_folder / MOVING):
                await self.sync()
                for table in self._tables.values():
                    await delete_old_versions(table, is_local=self._disk is not None)
            (self._location.log_folder / _COMPACTED).touch()
        return True

    def last_compaction(self) -> datetime.datetime | None:
        """When a process of this machine last completed a compaction."""
        try:
            found = (self._location.log_folder / _COMPACTED).stat()
        except (FileNotFoundError, PermissionError):
            return None
        return datetime.datetime.fromtimestamp(found.st_mtime, datetime.UTC)

    async def close(self) -> None:
        """Closes the connection, and releases the lock once all running writes have ended."""
        self._connection.close()
        if not self._writes:
            self._alive.close()
        for task in self._writes:
            task.add_done_callback(lambda _: None if self._writes else self._alive.close())


async def open_tables(location: Location, *, create: bool, write: bool = True) -> Tables:
    """Connects, repairs the database after a crash and opens the tables; creates missing tables.

    Args:
        create: whether the database may be missing.
        write: False to write nothing: no lock, no repair, no new table.

    Raises:
        FileNotFoundError: there is no database, and `create` is False.
        OldShape: a table is of an older version, or missing and `write` is False.
        Exception: whatever lancedb raises.
    """
    tables = Tables(location, await connect(location, create=create, write=write), write=write)
    try:
        await tables.open_all(create=create)
    except BaseException:
        await tables.close()
        raise
    return tables
