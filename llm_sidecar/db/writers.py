"""Checks whether a store lets several machines write to one table without losing rows.

Each commit of LanceDB creates a file that must not exist yet: on S3, with `If-None-Match: *`
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html). A store that
ignores this, or that checks and writes in two steps, lets two writers commit the same version. The
rows of one of them are then lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from llm_sidecar.db.lance import connect
from llm_sidecar.db.location import Location

ROUNDS: Final = 20
WRITERS: Final = 8


class Writers(NamedTuple):
    """The result of a check.

    Attributes:
        commits: how many commits of the writers succeeded.
        lost: how many of these another writer has overwritten.
    """

    commits: int
    lost: int


async def check_writers(location: Location, progress: Callable[[str], None]) -> Writers:
    """Lets writers create the same tables at once, and drops these tables again.

    Args:
        progress: called with the progress, in words.

    Raises:
        FileNotFoundError: there is no database in the folder.
        Exception: whatever lancedb raises if no writer can create a table.
    """
    connections = [await connect(location, create=False) for _ in range(WRITERS)]
    commits = versions = 0
    try:
        for number in range(ROUNDS):
            progress(f"{number} of {ROUNDS} rounds")
            created, found = await _create(connections, f"writers_check_{uuid.uuid4().hex}")
            commits, versions = commits + created, versions + found
    finally:
        for connection in connections:
            connection.close()
    return Writers(commits, commits - versions)


async def _create(connections: list[Any], table: str) -> tuple[int, int]:
    """How many writers have created a table, and how many versions it has then.

    lancedb looks for the table first. Of the writers that do not see one, the first commits version
    1 and the next version 2: each commit must be a version of its own.
    """
    import pyarrow as pa

    schema = pa.schema([pa.field("writer", pa.int64())])
    try:
        results = await asyncio.gather(
            *(connection.create_table(table, schema=schema) for connection in connections),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[0]
        versions = await (await connections[0].open_table(table)).list_versions()
    finally:
        with contextlib.suppress(Exception):
            await connections[0].drop_table(table)
    return len(results) - len(errors), len(versions)
