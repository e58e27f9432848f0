"""The database as the rest of the sidecar uses it."""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, TypeVar

from llm_sidecar.db import queries
from llm_sidecar.db.encoding import encoded, values_of
from llm_sidecar.db.filters import Filters
from llm_sidecar.db.lance import one_line
from llm_sidecar.db.location import location_of
from llm_sidecar.db.mover import Mover
from llm_sidecar.db.queries import Correction
from llm_sidecar.db.rows import (
    FEEDBACK,
    FEEDBACK_ID,
    SCHEMAS,
    WITHDRAWALS,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    PublishedFeedback,
)
from llm_sidecar.db.tables import Tables
from llm_sidecar.db.transaction import Claim, RequestKey, Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.journal.journal import Journal
from llm_sidecar.journal.outbox import JournalOutbox

T = TypeVar("T")
log = logging.getLogger(__name__)

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
_FROM_INBOX: Final = "inbox:"
"""Begins the keys of feedback from the inbox; see `PublishedFeedback`."""
_UNBOUNDED: Final = 2**31 - 1
_QUERY_SECONDS: Final = 5.0
"""The deadline of a query, because a remote store takes much longer to fail."""
_OPEN_SECONDS: Final = 30.0
_ELSEWHERE_SECONDS: Final = 2.0
"""Seconds for which a row of an object store may still be in the journal of another machine."""
_LOOK_AGAIN_SECONDS: Final = 0.2


def table_of(row: AnyRow) -> str:
    """The table that a row goes into."""
    return _TABLE_OF[type(row)]


async def _themselves(tables: Tables) -> Tables:
    return tables


class Store:
    """An append-only database. It acknowledges a row once the row would survive a power loss.

    It accepts rows while LanceDB is being opened or is unavailable; queries wait for LanceDB.
    Several processes may use one database at the same time.
    """

    def __init__(
        self, uri: str | Path, *, log_dir: Path | None = None, create: bool = True
    ) -> None:
        """Opens nothing yet.

        Args:
            uri: a folder, which is created if it is missing, or an `s3://` address.
            log_dir: the folder for the journal of an object store; `LANCEDB_LOG_DIR` unless given.
            create: whether to create a missing database.
        """
        self._location = location_of(uri, log_dir)
        folder, aside = self._location.log_folder, self._location.set_aside
        self._journal = Journal(folder, aside, lambda done: self._mover.note(done))
        self._mover = Mover(self._location, self._journal, create=create)
        self._is_closed = False

    @classmethod
    async def open(
        cls, uri: str | Path, *, timeout: float = _OPEN_SECONDS, create: bool = True
    ) -> Store:
        """Opens a database, and repairs it after a crash.

        Args:
            uri, create: see `Store`.
            timeout: seconds.

        Raises:
            DatabaseUnavailable: it cannot be opened, with the reason.
        """
        store = cls(uri, create=create)
        store.start()
        try:
            await store.opened(timeout)
        except BaseException:
            await store.close()
            raise
        return store

    def share(
        self,
        on_feedback: Callable[[], None],
        compacting: Callable[[], AbstractAsyncContextManager[bool]],
        opening: Callable[[], AbstractAsyncContextManager[object]],
    ) -> None:
        """Coordinates with other sidecars; call it before `start`.

        Args:
            on_feedback: is called after feedback, or a withdrawal, has reached its table.
            compacting: a lock between machines, used on an object store; it yields False if another
                machine compacts.
            opening: a lock between machines, used on an object store. A second machine that creates
                a missing table at the same time would replace the table of the first, rows
                included.
        """
        self._mover.on_feedback = on_feedback
        if self._location.folder is None:
            self._mover.compactor.alone = compacting
            self._mover.opening = opening

    def start(self) -> None:
        """Starts to accept rows and to open the database, in the background."""
        self._mover.start()

    async def opened(self, timeout: float = _OPEN_SECONDS) -> Tables:
        """The tables, once the database is open.

        Raises:
            DatabaseUnavailable: it is not within `timeout` seconds, or the last attempt failed.
        """
        return await self._mover.opened(timeout)

    async def moved(self, timeout: float = _OPEN_SECONDS) -> Tables:
        """The tables, once they contain every row that any process has committed so far.

        Raises:
            DatabaseUnavailable: the rows cannot be moved within `timeout` seconds.
        """
        return await self._query(_themselves, seconds=timeout)

    async def close(self) -> None:
        """Moves the rows of the journal to the tables, within a time limit, then closes."""
        self._is_closed = True
        await self._mover.close()
        try:
            await self._journal.close()
        except TimeoutError:
            log.error("the journal could not be closed: the disk takes too long")

    def refusal(self) -> str | None:
        """The reason why rows cannot be stored now, or None."""
        return "The database is closed." if self._is_closed else self._journal.refusal()

    def is_open(self) -> bool:
        """Whether queries are possible now, and the last row could be stored."""
        return self._mover.state == "open" and self._journal.failure is None

    async def append(self, row: AnyRow, *, again: bool = False) -> None:
        """Stores a row in the table of its type; see `commit`.

        Args:
            again: whether this object may already be stored; it is then not stored twice.
        """
        await self._journal.commit([encoded(table_of(row), row.as_row(), again=again)])
        self._mover.soon_if_many()

    async def commit(self, transaction: Transaction) -> None:
        """Stores rows, events and progress, and returns once they would survive a power loss.

        Feedback with the same `feedback_id` is stored once, also across processes.

        Raises:
            DatabaseUnavailable: nothing is stored; after the deadline, the outcome is unknown.
        """
        await self._journal.commit(
            [
                encoded(table_of(row), row.as_row(), stored_in=getattr(row, "stored_in", None))
                for row in transaction.rows
            ],
            transaction.events,
            transaction.progress,
            transaction.draft,
            transaction.replaces,
        )
        self._mover.soon_if_many()
        if any(table_of(row) in (FEEDBACK, WITHDRAWALS) for row in transaction.rows):
            self._mover.soon_for_others()

    async def claim(self, request: RequestKey, fingerprint: str) -> Claim:
        """Claims a request for this process. Waits while another live process answers it.

        End a claim that has no response with a `Transaction` that contains the response, or with
        `release`.

        Args:
            fingerprint: of the request's content.

        Raises:
            RequestKeyReused: the key belongs to a request with another fingerprint.
            DatabaseUnavailable: it cannot be claimed now.
        """
        return await self._journal.claims.claim(request, fingerprint)

    async def request_state(self, request: RequestKey) -> str | None:
        """The durable progress of a claimed request, as JSON text; None without any.

        Raises:
            DatabaseUnavailable: it cannot be read.
        """
        return await self._journal.claims.state(request)

    async def release(self, request: RequestKey) -> None:
        """Ends a claim without a response: the next claim gets its state.

        Raises:
            DatabaseUnavailable: the request stays claimed until this process ends.
        """
        await self._journal.claims.release(request)

    @property
    def outbox(self) -> JournalOutbox:
        """The events that are not sent yet, of all processes."""
        return self._journal.outbox

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
            since: an aware time; older rows are excluded.
            status: only runs with this status.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        options: dict[str, Any] = {} if since is None else {"since": since}
        if status is not None:
            options["filters"] = Filters(status=status)
        return await self._query(lambda tables: queries.newest(tables, table, count, **options))

    async def transaction(self, transaction_id: str) -> dict[str, list[dict[str, Any]]]:
        """The rows of one transaction, by table, newest first.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._query(lambda tables: queries.transaction(tables, transaction_id))

    async def mean_score_since(self, since: datetime.datetime) -> tuple[float | None, int]:
        """The mean (None without scores) and the number of the scores since an aware time.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._query(lambda tables: queries.mean_score(tables, since))

    async def recent_corrections(
        self,
        count: int,
        usable: Callable[[Correction], bool] = lambda correction: True,
        *,
        proposal_bytes: int = _UNBOUNDED,
        prompt_bytes: int = _UNBOUNDED,
        from_bus: bool = False,
    ) -> list[Correction]:
        """The latest usable correction of each run, in order of arrival, newest first.

        Args: see `queries.recent_corrections`.

        Raises:
            DatabaseUnavailable: they cannot be read.
        """
        return await self._query(
            lambda tables: queries.recent_corrections(
                tables,
                count,
                usable,
                proposal_bytes=proposal_bytes,
                prompt_bytes=prompt_bytes,
                from_bus=from_bus,
            )
        )

    async def prompt(self, run_id: str) -> str | None:
        """The prompt of a run; None if the run is not stored.

        On an object store, it looks again for a while: see `_found`.

        Raises:
            DatabaseUnavailable: it cannot be read.
        """
        return await self._found(lambda tables: queries.prompt(tables, run_id))

    async def is_withdrawn(self, feedback_id: str) -> bool:
        """Whether feedback is withdrawn.

        Raises:
            DatabaseUnavailable: it cannot be read.
        """
        return bool(await self._query(lambda tables: queries.withdrawn(tables, [feedback_id])))

    async def feedback_transaction(self, feedback_id: str) -> str | None:
        """The transaction_id of feedback; None if it is not stored.

        Feedback that is still in the journal is found even if LanceDB is unavailable. On an object
        store, it looks again for a while: see `_found`.

        Raises:
            DatabaseUnavailable: it cannot be read.
        """
        keys = (feedback_id, f"{PublishedFeedback.SOURCE}:{feedback_id}")
        data = await self._journal.find(FEEDBACK, keys) or await self._journal.find_by_column(
            FEEDBACK, _FROM_INBOX, FEEDBACK_ID, feedback_id
        )
        if data is not None and (row := values_of(FEEDBACK, data)) is not None:
            return str(row["transaction_id"])
        return await self._found(lambda tables: queries.feedback_transaction(tables, feedback_id))

    async def compact(self) -> bool:
        """Compacts the tables now; returns False if another process is compacting.

        Raises:
            DatabaseUnavailable: it failed.
        """
        return await self._query(self._mover.compactor.compact, seconds=math.inf)

    @property
    def log_folder(self) -> Path:
        """The local folder of the journal."""
        return self._location.log_folder

    async def id(self) -> str:
        """Identifies the database in events: its own id, or its journal's until that is known.

        Raises:
            DatabaseUnavailable: neither is known, because the journal cannot be used.
        """
        return await self._mover.known_id() or await self._journal.id()

    @property
    def journal_id(self) -> str:
        """Identifies the journal, which all processes of this machine share; known after the first
        claim."""
        return self._journal.current_id

    def has_id(self, name: str) -> bool:
        """Whether `id` has returned this name, in this process or in one with the same journal."""
        return name in (self._mover.database_id, *self._journal.ids)

    def status(self) -> dict[str, Any]:
        """The state for `/health`, as JSON types."""
        mover, journal = self._mover, self._journal
        compaction = mover.compactor.last
        return {
            "state": mover.state,
            "reason": mover.reason or journal.failure,
            "uri": self._location.shown,
            "rows_written": journal.rows_written,
            "rows_waiting": journal.rows_waiting,
            "journal": journal.status(),
            "fragments": dict(mover.compactor.fragments),
            "last_compaction": None if compaction is None else compaction.isoformat(),
            "compaction_failure": mover.compactor.failure,
            "compaction_failures": mover.compactor.failures,
            "repairs": list(mover.repairs),
        }

    async def _found(self, query: Callable[[Tables], Awaitable[T | None]]) -> T | None:
        """The result of a query. If there is none on an object store, it looks again for a while:
        the row may still be in the journal of another machine."""
        seconds = 0.0 if self._location.folder is not None else _ELSEWHERE_SECONDS
        until = time.monotonic() + seconds
        while (found := await self._query(query)) is None and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return found

    async def _query(
        self, query: Callable[[Tables], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Runs a query on all rows that have been acknowledged so far.

        Args:
            seconds: the deadline; `_QUERY_SECONDS` unless given.
        """
        seconds = seconds or _QUERY_SECONDS
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._mover.opened(min(seconds, _OPEN_SECONDS))
                await self._mover.flush()
                return await query(await self._mover.opened(_OPEN_SECONDS))
        except DatabaseUnavailable:
            raise
        except TimeoutError:
            reason = f"it took longer than {seconds:g} s"
        except Exception as error:  # noqa: BLE001 lancedb raises many types, OSError to RuntimeError
            reason = one_line(error)
        raise DatabaseUnavailable(
            f"The database cannot be read: {reason}; check LANCEDB_URI.", retry_after=5
        )
