"""What is asked of the tables: newest rows, one transaction, scores of a time, corrections.

A value never becomes part of a query's text: filters are built as expressions.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, NamedTuple

from llm_sidecar.db.schema import FEEDBACK, ROW_ID, RUNS, SCORES, TABLES, TRANSACTION
from llm_sidecar.db.tables import Tables

_SMALL: Final = 20_000
"""Rows up to which a whole scan is the quickest way to the newest."""
_FIRST_WINDOW: Final = datetime.timedelta(minutes=15)
_WIDER: Final = 4
_MOST_ROWS: Final = 2**31 - 1
"""The greatest limit that lancedb takes."""
_EPOCH: Final = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)


class Correction(NamedTuple):
    """A corrected proposal and the prompt it answers."""

    prompt: str
    proposal: dict[str, Any]
    transaction_id: str


async def newest(
    tables: Tables,
    table: str,
    count: int,
    *,
    since: datetime.datetime = _EPOCH,
    equal: Mapping[str, str | None] | None = None,
) -> list[dict[str, Any]]:
    """The newest rows of a table, newest first.

    Ordering reads all that it orders, so a large table is asked for the rows of the last 15
    minutes, hour, … until there are enough.

    Args:
        count: how many; all of them for 0 or less.
        since: an aware time; older rows do not count.
        equal: columns and the texts they must hold.
    """
    if count > 0 and await tables[table].count_rows() > _SMALL:
        window, start = _FIRST_WINDOW, datetime.datetime.now(datetime.UTC)
        while start > since:
            start = start - window if start - since > window else since
            found = (
                await _filtered(tables, table, start, equal)
                .select(["timestamp"])
                .limit(min(count, _MOST_ROWS))
                .to_arrow()
            )
            if len(found) >= count:
                break
            window *= _WIDER
        since = start
    return await _ordered(_filtered(tables, table, since, equal), count)


def _filtered(
    tables: Tables,
    table: str,
    since: datetime.datetime,
    equal: Mapping[str, str | None] | None = None,
) -> Any:
    from lancedb.expr import col, lit

    query = tables[table].query()
    conditions = [col("timestamp").gte(lit(since))] if since > _EPOCH else []
    conditions += [col(name).eq(lit(value)) for name, value in (equal or {}).items()]
    if conditions:
        whole = conditions[0]
        for condition in conditions[1:]:
            whole = whole.and_(condition)
        query = query.where(whole)
    return query


async def _ordered(query: Any, count: int) -> list[dict[str, Any]]:
    from lancedb.query import ColumnOrdering

    query = query.order_by([ColumnOrdering(column_name="timestamp", ascending=False)])
    if count > 0:
        query = query.limit(min(count, _MOST_ROWS))
    return [_shown(row) for row in await query.to_list()]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != ROW_ID}


async def transaction(tables: Tables, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of one walk from a prompt to a proposal and what people said of it, by table."""
    return {
        name: await _ordered(
            _filtered(tables, name, _EPOCH, {TRANSACTION[name]: transaction_id}), 0
        )
        for name in TABLES
    }


async def mean_score(tables: Tables, since: datetime.datetime) -> tuple[float | None, int]:
    """Mean (None of none) and number of the scores since an aware time."""
    total, count = 0.0, 0
    batches = await _filtered(tables, SCORES, since).select(["score"]).to_batches()
    async for batch in batches:
        # Arrow's own sum: a day may hold a million of them.
        total += batch.column("score").sum().as_py() or 0.0
        count += len(batch)
    return (total / count if count else None), count


async def recent_corrections(tables: Tables, count: int) -> list[Correction]:
    """The latest corrections whose run is known, newest first, one a transaction."""
    from lancedb.expr import col, lit

    corrected = await _ordered(
        tables[FEEDBACK].query().where(col("corrected_proposal").ne(lit(""))), 4 * count
    )
    latest: dict[str, str] = {}
    for row in corrected:
        latest.setdefault(row["transaction_id"], row["corrected_proposal"])
    if not latest:
        return []
    query = tables[RUNS].query().where(col("run_id").isin(list(latest)))
    runs = await query.select(["run_id", "input_query"]).to_list()
    prompts = {run["run_id"]: run["input_query"] for run in runs}
    return [
        Correction(prompts[name], proposal, name)
        for name, proposal in ((name, json_object(text)) for name, text in latest.items())
        if name in prompts and proposal is not None
    ][:count]


def json_object(text: str | None) -> dict[str, Any] | None:
    """The object that a text holds, or None: what older versions wrote need not be JSON."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def stream(
    tables: Tables, table: str, *, since: datetime.datetime = _EPOCH, columns: list[str]
) -> AsyncIterator[dict[str, list[Any]]]:
    """The columns of a table, batch by batch, in no particular order."""
    async for batch in await _filtered(tables, table, since).select(columns).to_batches():
        yield batch.to_pydict()
