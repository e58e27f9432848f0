"""The server's handle on the database: opens it in the background and again when that fails, and
keeps in memory what must be answered without asking it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from typing import Any, Final

from llm_sidecar.db import HermesScoreSchema, OrchestratorRunSchema, Phi3FeedbackSchema, Store
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.proposals import Example, Proposal

log = logging.getLogger(__name__)

_OPEN_WAIT: Final = 5.0
"""Seconds a request waits for a database that is just being opened."""
_BACKOFF_FIRST, _BACKOFF_MOST = 1.0, 30.0
_REFRESH_SECONDS: Final = 30.0
"""Other processes write too, so what is kept in memory is read again this often."""
_REFRESH_PAUSE: Final = 0.5
_LONGEST_EXAMPLE: Final = 2000
"""Characters; a longer prompt makes no few-shot example, since it would cost every request."""


class Archive:
    """Rows in, and the few questions that every request or probe asks, from memory.

    Attributes:
        examples: few-shot examples from the latest valid corrections, oldest first.
        mean_score: mean of the last 24 hours' scores, or None.
        num_scores: their number.
    """

    def __init__(self, uri: str, *, examples: int) -> None:
        """Opens nothing.

        Args:
            uri: folder or object store of the database.
            examples: greatest number of few-shot examples.
        """
        self.examples: tuple[Example, ...] = ()
        self._corrected: dict[str, dict[str, Any]] = {}
        self.mean_score: float | None = None
        self.num_scores = 0
        self._uri = uri
        self._max_examples = examples
        self._store: Store | None = None
        self._tried = asyncio.Event()
        self._reason: str | None = None
        self._stale = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to open the database."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Closes the database; every row that was acknowledged is in it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._store is not None:
            await self._store.close()
            self._store = None

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        if self._store is not None:
            return self._store.status()
        return {"state": "failed" if self._reason else "opening", "reason": self._reason}

    def available(self) -> bool:
        """Whether rows can be stored now."""
        return self._store is not None

    async def append_feedback(self, feedback: Phi3FeedbackSchema) -> bool:
        """Stores feedback; a correction can be a few-shot example from the next proposal on.

        Returns:
            Whether it is one: its run is known, its prompt short and the correction valid.

        Raises:
            DatabaseUnavailable: the row is not stored.
        """
        store = await self._opened()
        await store.append_feedback(feedback)
        if feedback.corrected_proposal is None:
            return False
        try:
            await self._refresh_examples(store)
        except DatabaseUnavailable as error:
            # The row is stored, and that is what was asked for.
            log.error("the examples are not refreshed: %s", error.detail)
            self._stale.set()
        example = self._corrected.get(feedback.transaction_id)
        return example == feedback.corrected_proposal

    async def log_run(self, run: OrchestratorRunSchema) -> None:
        """Stores a run; raises DatabaseUnavailable where that is not possible."""
        await (await self._opened()).log_run(run)

    async def log_hermes_score(self, score: HermesScoreSchema) -> None:
        """Stores a score; raises DatabaseUnavailable where that is not possible."""
        await (await self._opened()).log_hermes_score(score)
        self._stale.set()

    async def _opened(self) -> Store:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_OPEN_WAIT):
                await self._tried.wait()
        if self._store is None:
            raise DatabaseUnavailable(
                self._reason or "The database is still being opened; try again.", retry_after=5
            )
        return self._store

    async def _run(self) -> None:
        delay = _BACKOFF_FIRST
        while self._store is None:
            try:
                self._store = await Store.open(self._uri)
            except DatabaseUnavailable as error:
                if self._reason != error.detail:
                    log.error("%s", error.detail)
                self._reason = error.detail
                self._tried.set()
                await asyncio.sleep(delay)
                delay = min(_BACKOFF_MOST, 2 * delay)
        self._reason = None
        self._tried.set()
        log.info("the database is open")
        await self._keep_fresh(self._store)

    async def _keep_fresh(self, store: Store) -> None:
        while True:
            self._stale.clear()
            try:
                await self._refresh_examples(store)
                since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=24)
                self.mean_score, self.num_scores = await store.mean_score_since(since)
            except DatabaseUnavailable as error:
                log.error("%s", error.detail)
            # A burst of scores is read once.
            await asyncio.sleep(_REFRESH_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_SECONDS):
                    await self._stale.wait()

    async def _refresh_examples(self, store: Store) -> None:
        if not self._max_examples:
            return
        newest_first = await store.recent_corrections(4 * self._max_examples)
        usable = [
            (transaction_id, Example(prompt, corrected))
            for prompt, corrected, transaction_id in newest_first
            if len(prompt) <= _LONGEST_EXAMPLE and _is_proposal(corrected)
        ][: self._max_examples]
        self.examples = tuple(example for _, example in reversed(usable))
        self._corrected = {name: example.proposal for name, example in usable}


def _is_proposal(value: dict[str, Any]) -> bool:
    try:
        Proposal.model_validate(value)
    except ValueError:
        return False
    return True
