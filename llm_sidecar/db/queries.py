"""The queries: newest rows, rows of a transaction, mean score, latest corrections.

A value is never part of the text of a query: filters are built as expressions.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from llm_sidecar.db.filters import Filters
from llm_sidecar.db.nested import json_object
from llm_sidecar.db.rows import (
    FEEDBACK,
    FEEDBACK_ID,
    ROW_ID,
    RUNS,
    SCORES,
    TABLES,
    TRANSACTION,
    WITHDRAWALS,
    PublishedFeedback,
)
from llm_sidecar.db.tables import Tables

_SMALL: Final = 20_000
"""In tables of up to this many rows, a full scan finds the newest rows fastest."""
_FIRST_WINDOW: Final = datetime.timedelta(minutes=15)
_WIDER: Final = 4
_MOST_ROWS: Final = 2**31 - 1
"""The maximum limit of lancedb."""
EARLIEST: Final = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
_CORRECTIONS: Final = 64
_MOST_CORRECTIONS: Final = 4096
"""The first and the maximum number of corrections that the search for usable ones reads, newest
first."""
_AT_ONCE: Final = 500
"""The number of ids in one filter."""


class Correction(NamedTuple):
    """A corrected proposal and its prompt."""

    prompt: str
    proposal: dict[str, Any]
    transaction_id: str
    feedback_id: str


async def newest(
    tables: Tables,
    table: str,
    count: int,
    *,
    since: datetime.datetime = EARLIEST,
    filters: Filters | None = None,
) -> list[dict[str, Any]]:
    """The newest rows of a table, newest first.

    The database applies the filters as far as it can. Python then checks values inside JSON text.
    If too few rows remain, more rows are read.

    Args:
        count: the number of rows; 0 or less for all.
        since: an aware time; older rows are excluded.
        filters: what the rows must match.
    """
    conditions = [] if filters is None else filters.conditions(table)
    limit = count
    while True:
        read = await _newest(tables, table, limit, since, conditions)
        found = read if filters is None else [row for row in read if filters.matches(table, row)]
        if count <= 0:
            return found
        if len(found) >= count or len(read) < limit:
            return found[:count]
        limit *= _WIDER


async def _newest(
    tables: Tables, table: str, count: int, since: datetime.datetime, conditions: Sequence[Any]
) -> list[dict[str, Any]]:
    """The newest rows.

    A sort reads all rows in its range. So a query of a large table starts with the last 15 minutes,
    then the last hour, and so on, until it has enough rows.
    """
    if count > 0 and await tables[table].count_rows() > _SMALL:
        window, start = _FIRST_WINDOW, datetime.datetime.now(datetime.UTC)
        while start > since:
            start = start - window if start - since > window else since
            found = (
                await _filtered(tables, table, start, conditions)
                .select(["timestamp"])
                .limit(min(count, _MOST_ROWS))
                .to_arrow()
            )
            if len(found) >= count:
                break
            window *= _WIDER
        since = start
    return await _ordered(_filtered(tables, table, since, conditions), count)


def _filtered(
    tables: Tables, table: str, since: datetime.datetime, conditions: Sequence[Any] = ()
) -> Any:
    from lancedb.expr import col, lit

    query = tables[table].query()
    every = [col("timestamp").gte(lit(since))] if since > EARLIEST else []
    every += conditions
    return query.where(functools.reduce(lambda a, b: a.and_(b), every)) if every else query


async def _ordered(query: Any, count: int, column: str = "timestamp") -> list[dict[str, Any]]:
    from lancedb.query import ColumnOrdering

    query = query.order_by([ColumnOrdering(column_name=column, ascending=False)])
    if count > 0:
        query = query.limit(min(count, _MOST_ROWS))
    return [_shown(row) for row in await query.to_list()]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != ROW_ID}


async def transaction(tables: Tables, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of every table that belong to one transaction, each table's newest first."""
    from lancedb.expr import col, lit

    return {
        name: await _ordered(
            _filtered(tables, name, EARLIEST, [col(TRANSACTION[name]).eq(lit(transaction_id))]), 0
        )
        for name in TABLES
    }


async def mean_score(tables: Tables, since: datetime.datetime) -> tuple[float | None, int]:
    """The mean (None without scores) and the number of the scores since an aware time, without
    unreliable ones."""
    total, count = 0.0, 0
    query = _filtered(tables, SCORES, since).select(["score", "score_reliable"])
    batches = await query.to_batches()
    async for batch in batches:
        # A day may have a million scores, so Arrow adds them.
        reliable = batch.column("score_reliable").fill_null(True)  # null in rows of older versions
        scores = batch.column("score").filter(reliable)
        total += scores.sum().as_py() or 0.0
        count += len(scores)
    return (total / count if count else None), count


async def recent_corrections(
    tables: Tables,
    count: int,
    usable: Callable[[Correction], bool],
    *,
    proposal_bytes: int,
    prompt_bytes: int,
    from_bus: bool,
) -> list[Correction]:
    """The latest usable correction of each run, in order of arrival, newest first.

    A correction is skipped if it is withdrawn, not usable or without a stored run. Then an earlier
    correction of the same run may replace it.

    Args:
        count: the maximum number of corrections.
        usable: whether a correction can be used.
        proposal_bytes, prompt_bytes: the maximum size in UTF-8; larger ones are not read.
        from_bus: whether to include feedback that another service published.
    """
    from lancedb.expr import col, func, lit

    condition = col("corrected_proposal").ne(lit(""))
    condition = condition.and_(func("octet_length", col("corrected_proposal")).lte(proposal_bytes))
    if not from_bus:
        condition = condition.and_(col("source").ne(lit(PublishedFeedback.SOURCE)))
    columns = ["transaction_id", FEEDBACK_ID, "corrected_proposal", "received"]
    found: dict[str, Correction] = {}
    seen, limit = 0, _CORRECTIONS
    while True:
        query = tables[FEEDBACK].query().where(condition).select(columns)
        rows = await _ordered(query, limit, "received")
        for correction in await _corrections(tables, rows[seen:], prompt_bytes):
            if usable(correction):
                found.setdefault(correction.transaction_id, correction)
        if len(found) >= count or len(rows) < limit or limit >= _MOST_CORRECTIONS:
            return list(found.values())[:count]
        seen, limit = len(rows), limit * _WIDER


async def _corrections(
    tables: Tables, rows: Iterable[Mapping[str, Any]], prompt_bytes: int
) -> list[Correction]:
    """The corrections in the rows of feedback that is not withdrawn and has a stored run."""
    gone = await withdrawn(tables, [row[FEEDBACK_ID] for row in rows])
    left = [row for row in rows if row[FEEDBACK_ID] not in gone]
    prompts = await _prompts(tables, {row["transaction_id"] for row in left}, prompt_bytes)
    return [
        Correction(prompts[name], proposal, name, row[FEEDBACK_ID])
        for row in left
        if (name := row["transaction_id"]) in prompts
        and (proposal := json_object(row["corrected_proposal"])) is not None
    ]


async def corrections(tables: Tables, feedback_ids: Iterable[str]) -> dict[str, Correction]:
    """The corrections with these ids, by id, including withdrawn ones. Corrections without a stored
    run are left out.

    If feedback over HTTP and feedback of another service have the same id, the one over HTTP
    counts.
    """
    from lancedb.expr import col

    columns = ["transaction_id", FEEDBACK_ID, "corrected_proposal", "source"]
    rows: list[dict[str, Any]] = []
    for some in _batches(feedback_ids):
        query = tables[FEEDBACK].query().where(col(FEEDBACK_ID).isin(some))
        rows += await query.select(columns).to_list()
    rows.sort(key=lambda row: row["source"] == PublishedFeedback.SOURCE, reverse=True)
    prompts = await _prompts(tables, {row["transaction_id"] for row in rows})
    return {
        row[FEEDBACK_ID]: Correction(prompts[name], proposal, name, row[FEEDBACK_ID])
        for row in rows
        if (name := row["transaction_id"]) in prompts
        and (proposal := json_object(row["corrected_proposal"])) is not None
    }


async def _prompts(
    tables: Tables, run_ids: Iterable[str], most_bytes: int | None = None
) -> dict[str, str]:
    """The prompts of the stored runs; with `most_bytes`, only prompts up to this size."""
    from lancedb.expr import col, func

    prompts: dict[str, str] = {}
    for some in _batches(run_ids):
        condition = col("run_id").isin(some)
        if most_bytes is not None:
            condition = condition.and_(func("octet_length", col("input_query")).lte(most_bytes))
        query = tables[RUNS].query().where(condition).select(["run_id", "input_query"])
        prompts |= {run["run_id"]: run["input_query"] for run in await query.to_list()}
    return prompts


async def prompt(tables: Tables, run_id: str) -> str | None:
    """The prompt of a run; None if the run is not stored."""
    return (await _prompts(tables, [run_id])).get(run_id)


async def withdrawn(tables: Tables, feedback_ids: Iterable[str]) -> set[str]:
    """The ids in `feedback_ids` whose feedback is withdrawn."""
    from lancedb.expr import col

    found: set[str] = set()
    for some in _batches(feedback_ids):
        query = tables[WITHDRAWALS].query().where(col(FEEDBACK_ID).isin(some))
        found |= {row[FEEDBACK_ID] for row in await query.select([FEEDBACK_ID]).to_list()}
    return found


async def feedback_transaction(tables: Tables, feedback_id: str) -> str | None:
    """The transaction_id of feedback; None if it is not stored."""
    from lancedb.expr import col, lit

    query = tables[FEEDBACK].query().where(col(FEEDBACK_ID).eq(lit(feedback_id)))
    rows = await query.select(["transaction_id"]).limit(1).to_list()
    return rows[0]["transaction_id"] if rows else None


def _batches(ids: Iterable[str]) -> list[list[str]]:
    distinct = list(dict.fromkeys(ids))
    return [distinct[start : start + _AT_ONCE] for start in range(0, len(distinct), _AT_ONCE)]


async def stream(
    tables: Tables, table: str, *, since: datetime.datetime = EARLIEST, columns: list[str]
) -> AsyncIterator[dict[str, list[Any]]]:
    """The columns of a table, batch by batch, in no particular order."""
    async for batch in await _filtered(tables, table, since).select(columns).to_batches():
        yield batch.to_pydict()
