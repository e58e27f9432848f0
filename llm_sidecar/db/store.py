"""The database as the rest of the sidecar sees it."""

from __future__ import annotations

import asyncio
import datetime
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from llm_sidecar.db import questions
from llm_sidecar.db.filters import Filters
from llm_sidecar.db.log import Row
from llm_sidecar.db.place import place_of
from llm_sidecar.db.questions import Correction
from llm_sidecar.db.schema import (
    FEEDBACK,
    FEEDBACK_ID,
    SCHEMAS,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    PublishedFeedback,
)
from llm_sidecar.db.tables import Tables
from llm_sidecar.db.writer import Writer
from llm_sidecar.errors import DatabaseUnavailable, one_line

T = TypeVar("T")

AnyRow = (
    Phi3FeedbackSchema
    | FeedbackWithdrawalSchema
    | OrchestratorRunSchema
    | HermesScoreSchema
    | ProposalSchema
)
_TABLE_OF: Final = {schema: table for table, schema in SCHEMAS.items()} | {
    PublishedFeedback: FEEDBACK
}
_UNBOUNDED: Final = 2**31 - 1
_ASK_SECONDS: Final = 5.0
"""Deadline of one question; a remote store takes far longer to fail by itself."""
_OPEN_SECONDS: Final = 30.0


def table_of(row: AnyRow) -> str:
    """The table that a row goes into."""
    return _TABLE_OF[type(row)]


class Store:
    """A database. Rows are only ever added, and acknowledged once they would survive a power loss.

    It takes rows from the first moment, also while LanceDB is being opened or is away; questions
    wait for it. Several processes may use one database at once.
    """

    def __init__(
        self, uri: str | Path, *, log_dir: Path | None = None, create: bool = True
    ) -> None:
        """Opens nothing yet.

        Args:
            uri: a folder, which is made where it is missing, or an `s3://` address.
            log_dir: where the log of an object store goes; `LANCEDB_LOG_DIR` unless given.
            create: False to create no database where there is none.
        """
        self._place = place_of(uri, log_dir)
        self._writer = Writer(self._place, create=create)

    @classmethod
    async def open(
        cls, uri: str | Path, *, timeout: float = _OPEN_SECONDS, create: bool = True
    ) -> Store:
        """A database that is open: repaired where a crash has left something to repair, its rows
        that were only in a log replayed.

        Args:
            uri, create: as of `Store`.
            timeout: seconds.

        Raises:
            DatabaseUnavailable: it cannot be opened; says why.
        """
        store = cls(uri, create=create)
        store.start()
        try:
            await store.opened(timeout)
        except BaseException:
            await store.close()
            raise
        return store

    def start(self) -> None:
        """Begins to take rows and to open the database, in the background."""
        self._writer.start()

    async def opened(self, timeout: float = _OPEN_SECONDS) -> Tables:
        """The tables, once the database is open.

        Raises:
            DatabaseUnavailable: it is not within `timeout` seconds, or the last attempt failed.
        """
        return await self._writer.opened(timeout)

    async def close(self) -> None:
        """Moves what waits into the tables, within a bound, then closes."""
        await self._writer.close()

    def refusal(self) -> str | None:
        """Why rows cannot be stored now; None if they can."""
        return self._writer.refusal()

    def is_open(self) -> bool:
        """Whether questions can be asked now, and the last row could be stored."""
        return self._writer.state == "open" and self._writer.log_failure is None

    async def append(self, row: AnyRow) -> None:
        """Stores a row in the table of its type, and returns once it would survive a power loss.

        Feedback is stored once however often its `feedback_id` comes, also to other processes.

        Raises:
            DatabaseUnavailable: it is not stored, or, after the deadline, not known to be.
        """
        await self._writer.append(Row(table_of(row), row.as_row()))

    async def last(
        self,
        table: str,
        count: int,
        *,
        since: datetime.datetime | None = None,
        status: str | None = None,
    ) -> list[dict[str, Any]]:
        """The newest rows of a table, newest first; all of them for a count of 0 or less.

        Args:
            since: only those from this aware time on.
            status: only those with this `status`, which runs have.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        options: dict[str, Any] = {} if since is None else {"since": since}
        if status is not None:
            options["filters"] = Filters(status=status)
        return await self._ask(lambda tables: questions.newest(tables, table, count, **options))

    async def transaction(self, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
        """The rows of every table that belong to one transaction, each table's newest first.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._ask(lambda tables: questions.transaction(tables, transaction_id))

    async def mean_score_since(self, since: datetime.datetime) -> tuple[float | None, int]:
        """Mean (None of none) and number of the scores since an aware time.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._ask(lambda tables: questions.mean_score(tables, since))

    async def recent_corrections(
        self,
        count: int,
        usable: Callable[[Correction], bool] = lambda correction: True,
        *,
        proposal_bytes: int = _UNBOUNDED,
        prompt_bytes: int = _UNBOUNDED,
        from_bus: bool = False,
    ) -> list[Correction]:
        """The latest usable corrections in the order of arrival, newest first, one a run.

        Args:
            count: the greatest number of corrections.
            usable: whether a correction can be used.
            proposal_bytes, prompt_bytes: longer ones (in UTF-8) are not read.
            from_bus: whether feedback that another service published counts.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._ask(
            lambda tables: questions.recent_corrections(
                tables,
                count,
                usable,
                proposal_bytes=proposal_bytes,
                prompt_bytes=prompt_bytes,
                from_bus=from_bus,
            )
        )

    async def prompt(self, run_id: str) -> str | None:
        """The prompt of a run; None where the run is not stored.

        Raises:
            DatabaseUnavailable: it cannot be read.
        """
        return await self._ask(lambda tables: questions.prompt(tables, run_id))

    async def is_withdrawn(self, feedback_id: str) -> bool:
        """Whether feedback is withdrawn.

        Raises:
            DatabaseUnavailable: that is not known.
        """
        return bool(await self._ask(lambda tables: questions.withdrawn(tables, [feedback_id])))

    async def feedback_transaction(self, feedback_id: str) -> str | None:
        """The transaction_id of feedback; None where there is no such feedback.

        Feedback that is still in this process's log is found even while the database is away.

        Raises:
            DatabaseUnavailable: it is not known whether there is such feedback.
        """
        for row in self._writer.pending():
            if row.table == FEEDBACK and row.values[FEEDBACK_ID] == feedback_id:
                found: str = row.values["transaction_id"]
                return found
        return await self._ask(lambda tables: questions.feedback_transaction(tables, feedback_id))

    async def compact(self) -> bool:
        """Compacts the tables now; False where another process is at it.

        Raises:
            DatabaseUnavailable: it failed.
        """
        return await self._ask(lambda _: self._writer.compact(), seconds=math.inf)

    @property
    def log_folder(self) -> Path:
        """The local folder of the write-ahead logs."""
        return self._place.log_folder

    @property
    def database_id(self) -> str | None:
        """The database's own id, the same for every process that uses it; None until it has been
        opened."""
        return self._writer.database_id

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        writer = self._writer
        compaction = None if writer.tables is None else writer.tables.last_compaction()
        return {
            "state": writer.state,
            "reason": writer.reason or writer.log_failure,
            "uri": self._place.shown,
            "rows_written": writer.rows_written,
            "rows_waiting": writer.rows_waiting(),
            "log": writer.log_status(),
            "fragments": dict(writer.compactor.fragments),
            "last_compaction": None if compaction is None else compaction.isoformat(),
            "compaction_failure": writer.compactor.failure,
            "compaction_failures": writer.compactor.failures,
            "repairs": writer.repairs[-_SHOWN_REPAIRS:],
        }

    async def _ask(
        self, question: Callable[[Tables], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Asks of everything that has been acknowledged so far.

        Args:
            seconds: the deadline; `_ASK_SECONDS` unless given.
        """
        seconds = seconds or _ASK_SECONDS
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._writer.flush()
                return await question(await self._writer.opened(min(seconds, _OPEN_SECONDS)))
        except DatabaseUnavailable:
            raise
        except TimeoutError:
            reason = f"it took longer than {seconds:g} s"
        except Exception as error:  # noqa: BLE001 lancedb raises many types, OSError to RuntimeError
            reason = one_line(error)
        raise DatabaseUnavailable(
            f"The database cannot be read: {reason}; check LANCEDB_URI.", retry_after=5
        )


_SHOWN_REPAIRS: Final = 20
