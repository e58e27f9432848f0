"""Helpers for lancedb: connections, indices and one-line errors."""

from __future__ import annotations

import asyncio
import datetime
import gc
import importlib.util
import os
import sys
from typing import Any, Final

from llm_sidecar.db.location import TABLE_SUFFIX, Location
from llm_sidecar.db.rows import TRANSACTION
from llm_sidecar.text import cleaned

_KEEP_VERSIONS: Final = datetime.timedelta(minutes=2)
"""Old versions of a table are kept for this long, because a reader may still use them."""
_KEEP_VERSIONS_REMOTE: Final = datetime.timedelta(hours=1)
"""The same on an object store: a reader on another machine holds no lock, and versions have the
times of their writers' clocks."""
_KEEP_ALL: Final = datetime.timedelta(days=36500)
_CACHE_BYTES: Final = 16 << 20
_LOCAL_CACHE_BYTES: Final = 4 << 20
"""The size of each cache. Each commit adds about 100 KB, most of which nobody reads again, and a
local disk is fast."""
_LINE_CHARS: Final = 200
_REST_CLIENT: Final = "lance_namespace_urllib3_client"


async def connect(location: Location, *, create: bool, write: bool = True) -> Any:
    """An asynchronous lancedb connection.

    Args:
        create: whether the database may be missing.
        write: whether to create the folder for logs and locks.

    Raises:
        FileNotFoundError: there is no database, and `create` is False.
        Exception: whatever lancedb raises.
    """
    # The import takes seconds and must not block the event loop.
    lancedb = await asyncio.to_thread(_import_lancedb)
    if not create:
        await asyncio.to_thread(_require_tables, location)
    if write:
        await asyncio.to_thread(location.log_folder.mkdir, parents=True, exist_ok=True)
    cache = _CACHE_BYTES if location.folder is None else _LOCAL_CACHE_BYTES
    return await lancedb.connect_async(
        location.uri,
        read_consistency_interval=datetime.timedelta(0),
        storage_options=location.storage_options,
        session=lancedb.Session(index_cache_size_bytes=cache, metadata_cache_size_bytes=cache),
    )


async def build_indices(table: Any, *, again: bool = False) -> None:
    """Creates the missing indices of a table, or with `again` rebuilds the existing ones."""
    from lancedb.index import BTree

    present = {index.columns[0] for index in await table.list_indices()}
    for column in ("timestamp", TRANSACTION[table.name]):
        if (column in present) is again:
            await table.create_index(column, config=BTree(), replace=again)


async def merge_fragments(table: Any) -> None:
    """Merges small fragments and updates the indices; deletes no files."""
    await table.optimize(cleanup_older_than=_KEEP_ALL)


async def delete_old_versions(
    table: Any, *, is_local: bool = True, unverified: bool = False
) -> None:
    """Deletes the files of versions that nothing reads any more.

    Sync the newest version first: a power loss may destroy a version that is not synced.

    Args:
        is_local: whether the table is on this machine.
        unverified: whether to delete files of incomplete writes too; only safe without a writer.
    """
    keep = _KEEP_VERSIONS if is_local else _KEEP_VERSIONS_REMOTE
    await table.optimize(cleanup_older_than=keep, delete_unverified=unverified)


def one_line(error: Exception) -> str:
    """The message of an error, on one line of at most 200 characters."""
    return cleaned(" ".join(str(error).split())[:_LINE_CHARS]) or type(error).__name__


def _import_lancedb() -> Any:
    # lancedb needs only the models of this package. Its `__init__` imports a client for a REST
    # service that is not used, which takes almost half of the import time, and 13 MB.
    spec = importlib.util.find_spec(_REST_CLIENT) if _REST_CLIENT not in sys.modules else None
    if spec is not None:
        sys.modules[_REST_CLIENT] = importlib.util.module_from_spec(spec)
    # Garbage collections among all these new objects take a third of the rest.
    enabled = gc.isenabled()
    gc.disable()
    try:
        import lancedb
    finally:
        if enabled:
            gc.enable()
    return lancedb


def _require_tables(location: Location) -> None:
    if location.folder is None:
        return
    try:
        names = os.listdir(location.folder)  # noqa: PTH208 glob hides that a folder may not be read
    except (FileNotFoundError, NotADirectoryError):
        names = []
    if not any(name.endswith(TABLE_SUFFIX) for name in names):
        raise FileNotFoundError("There is no database")
