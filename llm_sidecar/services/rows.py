"""Commits transactions so that a failure never fails the request, and keeps the mean score."""

from __future__ import annotations

import datetime
import logging
from typing import Final

from llm_sidecar.db import (
    HermesScoreSchema,
    OrchestratorRunSchema,
    ProposalSchema,
    Store,
    table_of,
)
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.services.refresh import REFRESH_SECONDS, Refresher
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)

Row = OrchestratorRunSchema | HermesScoreSchema | ProposalSchema
_DAY: Final = datetime.timedelta(hours=24)


class Rows:
    """Stores rows and events, and keeps the mean of the last day's scores.

    Attributes:
        mean_score: mean of the last 24 hours' scores in [0, 1], or None if there are none.
        num_scores: their number.
    """

    def __init__(self, store: Store, bus: EventBus, metrics: MetricsSink) -> None:
        """Does no I/O yet.

        Args:
            store: the database.
            bus: gets the events that the journal does not accept.
            metrics: counts rows that are lost.
        """
        self.mean_score: float | None = None
        self.num_scores = 0
        self._store = store
        self._bus = bus
        self._metrics = metrics
        self._refresher = Refresher("the mean score", self._refresh)

    def start(self) -> None:
        """Starts to refresh the mean score from the database."""
        self._refresher.start()

    async def close(self) -> None:
        """Stops."""
        await self._refresher.close()

    async def commit(self, transaction: Transaction, *, preliminary: bool = False) -> bool:
        """Tries for a few seconds to make a transaction durable.

        If the journal does not accept it, its rows are lost; each is logged and counted. Its events
        wait in the memory of the event bus instead, and are lost if the process ends.

        Args:
            transaction: rows, events and progress.
            preliminary: whether later rows repeat these, so that a failure does not lose them.

        Returns:
            Whether the transaction is durable.
        """
        try:
            await self._store.commit(transaction)
        except DatabaseUnavailable as error:
            for row in () if preliminary else transaction.rows:
                table = table_of(row)
                log.error("a row of %s is not stored: %s", table, error.detail)
                self._metrics.row_lost(table)
            for event in transaction.events:
                log.error("%s is not durable: %s", event.type, error.detail)
                self._bus.send(event)
            return False
        if any(isinstance(row, HermesScoreSchema) for row in transaction.rows):
            self._refresher.soon()
        return True

    async def _refresh(self) -> None:
        await self._store.opened(REFRESH_SECONDS)
        since = datetime.datetime.now(datetime.UTC) - _DAY
        self.mean_score, self.num_scores = await self._store.mean_score_since(since)
