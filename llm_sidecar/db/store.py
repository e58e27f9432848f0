"""The database: one writer that batches, and the questions that are asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from llm_sidecar.db.schema import (
    FEEDBACK,
    RUNS,
    SCORES,
    TABLES,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    arrow_schemas,
)
from llm_sidecar.errors import DatabaseUnavailable

T = TypeVar("T")

DEFAULT_URI: Final = "/app/lancedb_data"
_CALL_SECONDS: Final = 5.0
"""Deadline of one read or write; a remote store takes far longer to fail by itself."""
_OPEN_SECONDS: Final = 30.0
_CACHE_BYTES: Final = 16 << 20
_REMEMBERED_IDS: Final = 10_000
_MOST_ROWS: Final = 2**31 - 1
"""The greatest limit that lancedb takes."""


class Store:
    """An open database. Rows are only ever added.

    Rows that arrive while a write runs are written together by the next one, so that many callers
    cost little more than one.
    """

    def __init__(self, uri: str, connection: Any, tables: Mapping[str, Any]) -> None:
        """Use `Store.open`."""
        self._uri = uri
        self._connection = connection
        self._tables = dict(tables)
        self._waiting: list[tuple[str, dict[str, Any], asyncio.Future[None]]] = []
        self._arrived = asyncio.Event()
        self._stored_ids: dict[str, None] = {}
        self._rows_written = 0
        self._closed = False
        self._writer = asyncio.create_task(self._write_batches())

    @classmethod
    async def open(
        cls, uri: str | Path, *, timeout: float = _OPEN_SECONDS, create: bool = True
    ) -> Store:
        """Connects and creates the tables that are missing.

        Args:
            uri: a folder, which is made where it is missing, or an `s3://` address.
            timeout: seconds.
            create: False to create nothing: then a missing folder or table is an error.

        Raises:
            DatabaseUnavailable: it cannot be opened; says why.
        """
        place = str(uri)
        async with _deadline(f"The database at {_masked(place)} cannot be opened", timeout):
            # lancedb takes seconds to import, and the event loop has better to do.
            lancedb = await asyncio.to_thread(_import_lancedb)
            if "://" not in place:
                await asyncio.to_thread(_require_folder, Path(place), create)
            connection = await lancedb.connect_async(
                place,
                read_consistency_interval=datetime.timedelta(0),
                session=lancedb.Session(
                    index_cache_size_bytes=_CACHE_BYTES, metadata_cache_size_bytes=_CACHE_BYTES
                ),
            )
            tables = {
                name: await (
                    connection.create_table(name, schema=schema, exist_ok=True)
                    if create
                    else connection.open_table(name)
                )
                for name, schema in arrow_schemas().items()
            }
        return cls(place, connection, tables)

    async def close(self) -> None:
        """Writes what waits, then closes."""
        if self._closed:
            return
        self._closed = True
        self._arrived.set()
        await self._writer
        self._connection.close()

    async def append_feedback(self, row: Phi3FeedbackSchema | Mapping[str, Any]) -> None:
        """Stores feedback, once however often its `feedback_id` comes, also to other processes.

        Raises:
            pydantic.ValidationError: a dict is no feedback.
            DatabaseUnavailable: it is not certain that the row is stored; a retry is safe.
        """
        values = Phi3FeedbackSchema.model_validate(row).as_row()
        if values["feedback_id"] not in self._stored_ids:
            await self._append(FEEDBACK, values)

    async def log_run(self, row: OrchestratorRunSchema | Mapping[str, Any]) -> None:
        """Stores a run; raises as `append_feedback` does."""
        await self._append(RUNS, OrchestratorRunSchema.model_validate(row).as_row())

    async def log_hermes_score(self, row: HermesScoreSchema | Mapping[str, Any]) -> None:
        """Stores a score; raises as `append_feedback` does."""
        await self._append(SCORES, HermesScoreSchema.model_validate(row).as_row())

    async def last(self, table: str, count: int) -> list[dict[str, Any]]:
        """The newest rows of a table, newest first; all of them for a count of 0 or less.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._newest(self._tables[table].query(), count)

    async def mean_score_since(self, since: datetime.datetime) -> tuple[float | None, int]:
        """Mean (None of none) and number of the scores since an aware time.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        from lancedb.expr import col, lit

        query = self._tables[SCORES].query().where(col("timestamp").gte(lit(since)))
        found = await _read(query.select(["score"]).to_arrow())
        scores = found.column("score").to_pylist()
        return (sum(scores) / len(scores) if scores else None), len(scores)

    async def recent_corrections(self, count: int) -> list[tuple[str, dict[str, Any], str]]:
        """The latest corrections whose run is known.

        Returns:
            (prompt, corrected proposal, transaction_id)s, newest first, one a transaction.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        from lancedb.expr import col, lit

        corrected = self._tables[FEEDBACK].query().where(col("corrected_proposal").ne(lit("")))
        newest: dict[str, str] = {}
        for row in await self._newest(corrected, 4 * count):
            newest.setdefault(row["transaction_id"], row["corrected_proposal"])
        if not newest:
            return []
        query = self._tables[RUNS].query().where(col("run_id").isin(list(newest)))
        runs = await _read(query.select(["run_id", "input_query"]).to_list())
        prompts = {run["run_id"]: run["input_query"] for run in runs}
        return [
            (prompts[transaction_id], json.loads(proposal), transaction_id)
            for transaction_id, proposal in newest.items()
            if transaction_id in prompts
        ][:count]

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        return {
            "state": "closed" if self._closed else "open",
            "uri": _masked(self._uri),
            "rows_written": self._rows_written,
            "rows_waiting": len(self._waiting),
        }

    async def _append(self, table: str, values: dict[str, Any]) -> None:
        if self._closed:
            raise DatabaseUnavailable("The database is closed.", retry_after=5)
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((table, values, written))
        self._arrived.set()
        async with _deadline("The row is not known to be stored", _CALL_SECONDS):
            await asyncio.shield(written)

    async def _write_batches(self) -> None:
        while self._waiting or not self._closed:
            await self._arrived.wait()
            self._arrived.clear()
            batch, self._waiting = self._waiting, []
            for table in TABLES:
                rows = [(values, written) for name, values, written in batch if name == table]
                if rows:
                    await self._write(table, rows)
            if self._closed:
                self._arrived.set()

    async def _write(
        self, table: str, rows: Sequence[tuple[dict[str, Any], asyncio.Future[None]]]
    ) -> None:
        try:
            values = [value for value, _ in rows]
            # One write that never ends must hold up neither the rows behind it nor the shutdown.
            async with asyncio.timeout(_CALL_SECONDS):
                await (
                    self._merge_feedback(values) if table == FEEDBACK else self._add(table, values)
                )
        except Exception as error:  # noqa: BLE001 every caller gets it, whatever lancedb raised
            for _, written in rows:
                if not written.done():
                    written.set_exception(error)
                    # A caller whose deadline has passed does not fetch it.
                    written.exception()
            return
        self._rows_written += len(rows)
        for _, written in rows:
            if not written.done():
                written.set_result(None)

    async def _add(self, table: str, values: list[dict[str, Any]]) -> None:
        await self._tables[table].add(_arrow(table, values))

    async def _merge_feedback(self, values: list[dict[str, Any]]) -> None:
        # merge_insert takes two equal keys inside one batch for two rows.
        unique = {row["feedback_id"]: row for row in values}
        merge = self._tables[FEEDBACK].merge_insert(["feedback_id"])
        await merge.when_not_matched_insert_all().execute(_arrow(FEEDBACK, list(unique.values())))
        self._stored_ids.update(dict.fromkeys(unique))
        while len(self._stored_ids) > _REMEMBERED_IDS:
            del self._stored_ids[next(iter(self._stored_ids))]

    async def _newest(self, query: Any, count: int) -> list[dict[str, Any]]:
        from lancedb.query import ColumnOrdering

        query = query.order_by([ColumnOrdering(column_name="timestamp", ascending=False)])
        if count > 0:
            query = query.limit(min(count, _MOST_ROWS))
        rows: list[dict[str, Any]] = await _read(query.to_list())
        return rows


def default_uri() -> str:
    """`LANCEDB_URI`, or the folder in the container."""
    return os.environ.get("LANCEDB_URI") or DEFAULT_URI


def _import_lancedb() -> Any:
    import lancedb

    return lancedb


def _arrow(table: str, values: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(values, schema=arrow_schemas()[table])


def _require_folder(folder: Path, create: bool) -> None:
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise FileNotFoundError("There is no database")


async def _read(query: Coroutine[Any, Any, T]) -> T:
    async with _deadline("The database cannot be read", _CALL_SECONDS):
        return await query


@contextlib.asynccontextmanager
async def _deadline(what: str, seconds: float) -> AsyncIterator[None]:
    """Turns whatever lancedb raises, and a deadline that passes, into DatabaseUnavailable."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except DatabaseUnavailable:
        raise
    except TimeoutError:
        reason = f"it took longer than {seconds:g} s"
    except Exception as error:  # noqa: BLE001 lancedb raises many types, OSError to RuntimeError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    else:
        return
    raise DatabaseUnavailable(f"{what}: {reason}; check LANCEDB_URI.", retry_after=5)


def _masked(uri: str) -> str:
    """The address without credentials and query."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
