"""Feedback, joined with the run, proposal and score that it is about.

Withdrawn feedback is left out. A `Content` defines the lines of an export: `RECORDS` writes every
record unchanged.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from llm_sidecar.db.nested import json_object
from llm_sidecar.db.queries import EARLIEST, stream
from llm_sidecar.db.rows import FEEDBACK, FEEDBACK_ID, PROPOSALS, RUNS, WITHDRAWALS
from llm_sidecar.db.tables import Tables

_AT_ONCE: Final = 500
"""Transactions in one query."""
_COLUMNS: Final = (
    "transaction_id",
    "timestamp",
    "feedback_type",
    "feedback_content",
    "corrected_proposal",
    "author",
)
_WITHDRAWN: Final = "withdrawn"

Feedback = dict[str, Any]
"""A row of feedback, with the columns in `_COLUMNS` as the table holds them."""
Record = dict[str, Any]
"""A row of feedback with the timestamp as ISO 8601 text, the correction as an object, and the
fields of `_Transaction`: JSON types only."""


class LeftOut(Exception):
    """A record is left out of the export.

    Attributes:
        reason: one of the reasons that the content declares.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Content(NamedTuple):
    """The contents of an export.

    Attributes:
        select: takes all feedback, oldest first, and returns the rows to export in their order.
        line: turns a record into a line; raises LeftOut to leave it out.
        reasons: why `line` leaves records out, in the order of the summary.
    """

    select: Callable[[list[Feedback]], list[Feedback]]
    line: Callable[[Record], dict[str, Any]]
    reasons: tuple[str, ...] = ()


RECORDS: Final = Content(select=lambda feedback: feedback, line=lambda record: record)


class Export:
    """One export.

    Attributes:
        left_out: the number of rows left out so far, by reason.
    """

    def __init__(self, tables: Tables, content: Content) -> None:
        self.left_out = Counter(dict.fromkeys((_WITHDRAWN, *content.reasons), 0))
        self._tables = tables
        self._content = content

    async def lines(
        self, progress: Callable[[str], None], since: datetime.datetime = EARLIEST
    ) -> AsyncIterator[dict[str, Any]]:
        """The lines of the export, oldest feedback first.

        Args:
            progress: called with the progress, in words.
            since: an aware time; older feedback does not count.

        Raises:
            Exception: whatever lancedb raises.
        """
        feedback = self._content.select(await self._feedback(since))
        for start in range(0, len(feedback), _AT_ONCE):
            rows = feedback[start : start + _AT_ONCE]
            found = await _transactions(self._tables, {row["transaction_id"] for row in rows})
            for row in rows:
                try:
                    yield self._content.line(_record(row, found.get(row["transaction_id"])))
                except LeftOut as left_out:
                    self.left_out[left_out.reason] += 1
            progress(f"{start + len(rows)} of {len(feedback)} feedback rows")

    async def _feedback(self, since: datetime.datetime) -> list[Feedback]:
        withdrawn = {
            feedback_id
            async for batch in stream(self._tables, WITHDRAWALS, columns=[FEEDBACK_ID])
            for feedback_id in batch[FEEDBACK_ID]
        }
        rows = []
        columns = [FEEDBACK_ID, *_COLUMNS]
        async for batch in stream(self._tables, FEEDBACK, since=since, columns=columns):
            for feedback_id, *values in zip(*(batch[name] for name in columns), strict=True):
                if feedback_id in withdrawn:
                    self.left_out[_WITHDRAWN] += 1
                else:
                    rows.append(dict(zip(_COLUMNS, values, strict=True)))
        return sorted(rows, key=lambda row: row["timestamp"])


class _Transaction(NamedTuple):
    """The rows of a transaction; None for each missing row, and for an unreliable score."""

    prompt: str | None = None
    proposal: dict[str, Any] | None = None
    assessment: str | None = None
    score: float | None = None
    answer_mass: float | None = None


def _record(row: Feedback, transaction: _Transaction | None) -> Record:
    return {
        **row,
        "timestamp": row["timestamp"].isoformat(),
        "corrected_proposal": json_object(row["corrected_proposal"]),
        **(transaction or _Transaction())._asdict(),
    }


async def _transactions(tables: Tables, ids: Iterable[str]) -> dict[str, _Transaction]:
    from lancedb.expr import col

    wanted = list(ids)
    # A run without a row in the table of proposals has its proposal in its output.
    runs = tables[RUNS].query().where(col("run_id").isin(wanted))
    found = {
        run["run_id"]: _from_run(run["input_query"], run["final_output"])
        for run in await runs.select(["run_id", "input_query", "final_output"]).to_list()
    }
    proposals = tables[PROPOSALS].query().where(col("transaction_id").isin(wanted))
    for row in await proposals.to_list():
        found[row["transaction_id"]] = _Transaction(
            row["prompt"],
            json_object(row["proposal"]),
            row["assessment"],
            _reliable_score(row),
            row["answer_mass"],
        )
    return found


def _from_run(prompt: str, final_output: str) -> _Transaction:
    output = json_object(final_output) or {}
    proposal = output.get("proposal")
    return _Transaction(
        prompt,
        proposal if isinstance(proposal, dict) else None,
        output.get("assessment"),
        _reliable_score(output),
        output.get("answer_mass"),
    )


def _reliable_score(row: Mapping[str, Any]) -> float | None:
    """The score, unless the row says that it is not reliable; rows of older versions do not."""
    return None if row.get("score_reliable") is False else row.get("score")
