"""The open tables: connecting, repairing what a crash left, writing rows, compacting."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import gc
import importlib.util
import logging
import os
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from llm_sidecar.db.disk import Disk
from llm_sidecar.db.log import Row, locked, sweep
from llm_sidecar.db.place import TABLE_SUFFIX, Place
from llm_sidecar.db.schema import (
    FEEDBACK,
    KEYS,
    TABLES,
    TRANSACTION,
    arrow_schemas,
    database_id,
    is_current,
    new_table_schema,
    require_not_newer,
)
from llm_sidecar.errors import DatabaseUnavailable, one_line

log = logging.getLogger(__name__)

_CACHE_BYTES: Final = 16 << 20
_KEEP_VERSIONS: Final = datetime.timedelta(minutes=2)
"""Old versions stay as long as somebody may still be reading them."""
_LOCK_PAUSE: Final = 0.02
_REST_CLIENT: Final = "lance_namespace_urllib3_client"
"""lancedb uses the models of this package for types. The package itself brings the client of a REST
service that nothing here calls: 13 MB and half of the time that importing lancedb takes."""
_OF_THE_MACHINE: Final = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EROFS,
)
FRAGMENTS: Final = 32
"""A table with as many is worth compacting."""
COMPACTING: Final = "compact.lock"
"""Locked by who compacts."""
_COMPACTED: Final = "compacted"
"""Touched when it is done."""


_OLD_SHAPE: Final = (
    "The table {} has the shape of an older version; stop all that uses the database and run "
    "`python -m llm_sidecar.db migrate`."
)


class OldShape(DatabaseUnavailable):
    """A table has the shape of an older version."""


class Tables:
    """The tables of one database, open for reading and writing.

    Attributes:
        repairs: what was done on opening, in words.
        database_id: the database's own id, the same for every process that uses it; None where it
            has none.
    """

    def __init__(self, place: Place, connection: Any) -> None:
        """Use `open_tables`."""
        self.repairs: list[str] = []
        self.database_id: str | None = None
        self._place = place
        self._connection = connection
        # Held as long as any write of this process may be running.
        self._alive = contextlib.ExitStack()
        self._busy: set[asyncio.Task[None]] = set()
        self._disk = Disk(place) if place.folder else None
        self._tables: dict[str, Any] = {}
        self._may_write = True

    def __getitem__(self, name: str) -> Any:
        return self._tables[name]

    async def open_all(self, *, create: bool) -> None:
        """Repairs the database where this is the only process that has it open, then opens the
        tables and creates those that are missing.

        Raises:
            FileNotFoundError: there is no table at all, and `create` is False.
            OldShape: a table is of an older version.
            Exception: whatever lancedb raises.
        """
        async with _locked_soon(self._place.log_folder / "opening.lock"):
            with locked(self._place.log_folder / "alive.lock", wait=False) as alone:
                if alone and self._disk is not None:
                    await self._repair(self._disk)
            # From here on nobody else is alone.
            while not self._alive.enter_context(
                locked(self._place.log_folder / "alive.lock", wait=False, shared=True)
            ):
                self._alive.close()
                await asyncio.sleep(_LOCK_PAUSE)
            present = (await self._connection.list_tables()).tables
            if not create and not present:
                raise FileNotFoundError("There is no database")
            for name in TABLES:
                await self._open(name, present)
            self.database_id = database_id(await self._tables[FEEDBACK].schema())

    async def open_to_read(self) -> None:
        """Opens the tables without writing anything: no lock, no repair, no new table.

        Raises:
            FileNotFoundError: there is no table at all.
            OldShape: a table is of an older version, or missing.
            Exception: whatever lancedb raises.
        """
        self._may_write = False
        present = (await self._connection.list_tables()).tables
        if not present:
            raise FileNotFoundError("There is no database")
        for name in TABLES:
            await self._open(name, present)

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
            raise OldShape(_OLD_SHAPE.format(name))

    async def _create(self, name: str) -> Any:
        try:
            return await self._connection.create_table(name, schema=new_table_schema(name))
        except Exception:
            if name not in (await self._connection.list_tables()).tables:
                raise
            # Another machine has created it at the same time.
            return await self._connection.open_table(name)

    async def _repair(self, disk: Disk) -> None:
        await asyncio.to_thread(sweep, self._place.log_folder)
        tables = await asyncio.to_thread(disk.tables)
        synced = await asyncio.to_thread(disk.synced_versions)
        newest: dict[str, int] = {}
        for name in tables:
            version = await self._first_readable(disk, name, (synced or {}).get(name, 0), synced)
            if version:
                newest[name] = version
        await asyncio.to_thread(disk.adopt, newest)

    async def _first_readable(
        self, disk: Disk, name: str, synced: int, note: dict[str, int] | None
    ) -> int:
        """Sets unreadable versions aside until one is readable; 0 where none is left.

        Only versions that may not have been synced are read whole.
        """
        intact = True
        while name in await asyncio.to_thread(disk.tables):
            try:
                expected = await asyncio.to_thread(disk.newest_version, name)
                table = await self._connection.open_table(name)
                version = int(await table.version())
                if version != expected:
                    # lancedb takes a manifest of zeros for an empty one of version 0.
                    raise ValueError(f"it says that it is version {version}")
                unclean = note is not None and version > synced
                if unclean:
                    await _read_whole(table)
            except Exception as error:
                if _is_of_the_machine(error):
                    raise
                done = await asyncio.to_thread(disk.set_newest_aside, name)
                log.error("%s (%s)", done, one_line(error))
                self.repairs.append(done)
                intact = False
            else:
                if unclean:
                    await self._set_torn_aside(disk, name)
                    await self._tidy_after_crash(table, intact)
                return int(await table.version())
        return 0

    async def _set_torn_aside(self, disk: Disk, name: str) -> None:
        """An older version that is cut off would end every later tidying."""
        for done in await asyncio.to_thread(disk.set_torn_aside, name):
            log.error("%s", done)
            self.repairs.append(done)

    async def _tidy_after_crash(self, table: Any, intact: bool) -> None:
        """Builds the indices of a table anew, which may be torn, and deletes half-written files.

        Args:
            intact: no version was set aside; otherwise what such a one refers to stays.
        """
        try:
            await _build_indices(table, again=True)
            with locked(self._place.log_folder / COMPACTING, wait=False) as mine:
                if mine and intact:
                    await table.optimize(cleanup_older_than=_KEEP_VERSIONS, delete_unverified=True)
        except Exception as error:  # noqa: BLE001 the rows are readable, and that is what counts
            failed = f"{table.name}: tidying up after a crash failed: {one_line(error)}"
            log.error("%s", failed)
            self.repairs.append(failed)

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        """Adds rows that cannot be there yet; raises whatever lancedb raises."""
        data = await asyncio.to_thread(_arrow, table, rows)
        await self._to_its_end(self._tables[table].add(data))

    async def merge(self, table: str, rows: Sequence[Row]) -> None:
        """Adds those rows whose key is not there; raises whatever lancedb raises."""
        data = await asyncio.to_thread(_arrow, table, rows)
        merge = self._tables[table].merge_insert([KEYS[table]]).when_not_matched_insert_all()
        await self._to_its_end(merge.execute(data))

    async def _to_its_end(self, writing: Coroutine[Any, Any, Any]) -> None:
        """Waits for a write, which goes on when the caller is cancelled: lancedb would not stop it
        either, and until it ends nobody else may count as alone."""

        async def work() -> None:
            await writing

        task = asyncio.create_task(work())
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)
        await asyncio.shield(task)

    async def sync(self, tables: Iterable[str] = TABLES) -> None:
        """Makes what the tables hold survive a power loss.

        Raises:
            OSError
        """
        if self._disk is not None:
            versions = {name: int(await self._tables[name].version()) for name in tables}
            await asyncio.to_thread(self._disk.sync, versions)

    async def fragments(self, table: str) -> int:
        """How many pieces the table is in."""
        stats = await self._tables[table].stats()
        return int(stats["fragment_stats"]["num_fragments"])

    async def compact(self) -> bool:
        """Joins small fragments, brings the indices up to date, deletes versions that nobody reads
        any more; in one process at a time.

        Returns:
            Whether it was done: False where another process is at it.
        """
        done: list[bool] = []

        async def work() -> None:
            done.append(await self._compact())

        await self._to_its_end(work())
        return done[0]

    @contextlib.asynccontextmanager
    async def unchanging(self) -> AsyncIterator[None]:
        """Prevents compaction for the time of a long read, because it deletes files.

        Without write permission there is no lock. Then a file may be deleted two minutes after the
        read began.
        """
        if not self._may_write:
            yield
            return
        async with _locked_soon(self._place.log_folder / COMPACTING, shared=True):
            yield

    async def _compact(self) -> bool:
        with locked(self._place.log_folder / COMPACTING, wait=False) as mine:
            if not mine:
                return False
            for name in TABLES:
                table = self._tables[name]
                await table.checkout_latest()
                if await table.count_rows():
                    await _build_indices(table)
                await table.optimize(cleanup_older_than=_KEEP_VERSIONS)
            await self.sync()
            (self._place.log_folder / _COMPACTED).touch()
        return True

    def last_compaction(self) -> datetime.datetime | None:
        """When any process of this machine last finished one."""
        try:
            found = (self._place.log_folder / _COMPACTED).stat()
        except (FileNotFoundError, PermissionError):
            return None
        return datetime.datetime.fromtimestamp(found.st_mtime, datetime.UTC)

    async def close(self) -> None:
        """Closes the connection; others may be alone again once what runs has ended."""
        self._connection.close()
        if not self._busy:
            self._alive.close()
        for task in self._busy:
            task.add_done_callback(lambda _: None if self._busy else self._alive.close())


async def open_tables(place: Place, *, create: bool) -> Tables:
    """Connects and opens everything.

    Raises:
        FileNotFoundError: there is no database, and `create` is False.
        OldShape: a table is of an older version.
        Exception: whatever lancedb raises.
    """
    connection = await connect(place, create=create)
    tables = Tables(place, connection)
    try:
        await tables.open_all(create=create)
    except BaseException:
        await tables.close()
        raise
    return tables


async def open_tables_to_read(place: Place) -> Tables:
    """Connects and opens everything without writing anything.

    Raises:
        FileNotFoundError: there is no database.
        OldShape: a table is of an older version, or missing.
        Exception: whatever lancedb raises.
    """
    tables = Tables(place, await connect(place, create=False, write=False))
    try:
        await tables.open_to_read()
    except BaseException:
        await tables.close()
        raise
    return tables


async def connect(place: Place, *, create: bool, write: bool = True) -> Any:
    """An asynchronous lancedb connection.

    Args:
        create: whether the database may be missing.
        write: whether to create the folder for logs and locks.

    Raises:
        FileNotFoundError: there is no database, and `create` is False.
        Exception: whatever lancedb raises.
    """
    # It takes seconds to import, and the event loop has better to do.
    lancedb = await asyncio.to_thread(_import_lancedb)
    if not create:
        await asyncio.to_thread(_require_tables, place)
    if write:
        await asyncio.to_thread(place.log_folder.mkdir, parents=True, exist_ok=True)
    return await lancedb.connect_async(
        place.uri,
        read_consistency_interval=datetime.timedelta(0),
        storage_options=place.storage_options,
        session=lancedb.Session(
            index_cache_size_bytes=_CACHE_BYTES, metadata_cache_size_bytes=_CACHE_BYTES
        ),
    )


async def _read_whole(table: Any) -> None:
    async for _ in await table.query().to_batches():
        pass


async def _build_indices(table: Any, *, again: bool = False) -> None:
    """Creates the indices that are missing; with `again` those that are there anew."""
    from lancedb.index import BTree

    present = {index.columns[0] for index in await table.list_indices()}
    for column in ("timestamp", TRANSACTION[table.name]):
        if (column in present) is again:
            await table.create_index(column, config=BTree(), replace=again)


def _import_lancedb() -> Any:
    first = "lancedb" not in sys.modules
    if first:
        _leave_out(_REST_CLIENT)
    import lancedb

    if first:
        # What is loaded by now stays: to look through all of it at each full collection of garbage
        # would stop the process for as long as a request takes.
        gc.freeze()
    return lancedb


def _leave_out(package: str) -> None:
    """Lets the modules of a package be imported without running its own `__init__`."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if spec is not None:
        sys.modules[package] = importlib.util.module_from_spec(spec)


def _arrow(table: str, rows: Sequence[Row]) -> Any:
    """The rows as an Arrow table, one a key: a merge takes equal ones for different rows."""
    import pyarrow as pa

    unique = {row.values[KEYS[table]]: row.values for row in reversed(rows)}
    return pa.Table.from_pylist(list(unique.values())[::-1], schema=arrow_schemas()[table])


def _require_tables(place: Place) -> None:
    if place.folder is None:
        return
    try:
        names = os.listdir(place.folder)  # noqa: PTH208 glob hides that a folder may not be read
    except (FileNotFoundError, NotADirectoryError):
        names = []
    if not any(name.endswith(TABLE_SUFFIX) for name in names):
        raise FileNotFoundError("There is no database")


@contextlib.asynccontextmanager
async def _locked_soon(path: Path, *, shared: bool = False) -> AsyncIterator[None]:
    """Holds the lock on a file; waits for it without holding up the event loop."""
    while True:
        with locked(path, wait=False, shared=shared) as mine:
            if mine:
                yield
                return
        await asyncio.sleep(_LOCK_PAUSE)


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an error says that the machine lacks something, and nothing of the file."""
    text = str(error)
    return any(os.strerror(number) in text for number in _OF_THE_MACHINE)
