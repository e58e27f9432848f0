"""Stores rows of runs, proposals and scores. A failure is logged and never fails the request."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Sequence
from typing import Final

from llm_sidecar.db import (
    HermesScoreSchema,
    OrchestratorRunSchema,
    ProposalSchema,
    Store,
    table_of,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.services.refresh import REFRESH_SECONDS, Refresher
from llm_sidecar.telemetry.metrics import MetricsSink

log = logging.getLogger(__name__)

Row = OrchestratorRunSchema | HermesScoreSchema | ProposalSchema
_DAY: Final = datetime.timedelta(hours=24)


class Rows:
    """Stores rows, and keeps the mean of the last day's scores.

    Attributes:
        mean_score: mean of the last 24 hours' scores in [0, 1], or None if there are none.
        num_scores: their number.
    """

    def __init__(self, store: Store, metrics: MetricsSink) -> None:
        """Does no I/O yet.

        Args:
            store: the database.
            metrics: counts rows that are lost.
        """
        self.mean_score: float | None = None
        self.num_scores = 0
        self._store = store
        self._metrics = metrics
        self._refresher = Refresher("the mean score", self._refresh)

    def start(self) -> None:
        """Starts to refresh the mean score from the database."""
        self._refresher.start()

    async def close(self) -> None:
        """Stops."""
        await self._refresher.close()

    async def store(self, rows: Sequence[Row]) -> bool:
        """Tries for a few seconds to store rows.

        Returns:
            Whether all rows are stored; a failure is logged and counted, not raised.
        """
        return all(await asyncio.gather(*map(self._store_one, rows)))

    async def _store_one(self, row: Row) -> bool:
        try:
            await self._store.append(row)
        except DatabaseUnavailable as error:
            table = table_of(row)
            log.error("a row of %s is not stored: %s", table, error.detail)
            self._metrics.row_lost(table)
            return False
        if isinstance(row, HermesScoreSchema):
            self._refresher.soon()
        return True

    async def _refresh(self) -> None:
        await self._store.opened(REFRESH_SECONDS)
        since = datetime.datetime.now(datetime.UTC) - _DAY
        self.mean_score, self.num_scores = await self._store.mean_score_since(since)
