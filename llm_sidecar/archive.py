"""The server's handle on the database: keeps in memory what must be answered without asking it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from llm_sidecar.db import (
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    Store,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.proposals import Example, is_valid
from llm_sidecar.text import find_fault

log = logging.getLogger(__name__)

_REFRESH_SECONDS: Final = 30.0
"""Other processes write too, so what is kept in memory is read again this often."""
_REFRESH_PAUSE: Final = 0.5
_RETRY_PAUSE: Final = 1.0
_LONGEST_EXAMPLE: Final = 2000
"""Characters; a longer prompt makes no few-shot example, since it would cost every request."""


class Archive:
    """Rows in, and the few questions that every request or probe asks, from memory.

    Attributes:
        examples: few-shot examples from the latest valid corrections, oldest first.
        mean_score: mean of the last 24 hours' scores, or None.
        num_scores: their number.
    """

    def __init__(
        self,
        uri: str,
        *,
        log_dir: Path | None = None,
        examples: int,
        on_examples: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens nothing.

        Args:
            uri: folder or object store of the database.
            log_dir: where the log of an object store goes.
            examples: greatest number of few-shot examples.
            on_examples: is called where `examples` has changed.
        """
        self.examples: tuple[Example, ...] = ()
        self._corrected: dict[str, dict[str, Any]] = {}
        self.mean_score: float | None = None
        self.num_scores = 0
        self._max_examples = examples
        self._on_examples = on_examples
        self._store = Store(uri, log_dir=log_dir)
        self._stale = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def log_folder(self) -> Path:
        """A local folder that outlives the server, beside the database or its log."""
        return self._store.log_folder

    def start(self) -> None:
        """Begins to take rows and to open the database."""
        self._store.start()
        self._task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Closes the database; every row that was acknowledged is in it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._store.close()

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        return self._store.status()

    def available(self) -> bool:
        """Whether rows can be stored now."""
        return self._store.has_room()

    def is_whole(self) -> bool:
        """Whether rows can be stored and questions asked."""
        return self._store.is_open()

    async def append_feedback(self, feedback: Phi3FeedbackSchema) -> bool | None:
        """Stores feedback; a correction can be a few-shot example from the next proposal on.

        Returns:
            Whether it is one: its run is known, its prompt short and the correction valid. None
            where that is not known before the database is back.

        Raises:
            DatabaseUnavailable: the row is not stored.
        """
        await self._store.append(feedback)
        if feedback.corrected_proposal is None:
            return False
        if not self._store.is_open():
            return None
        try:
            await self._refresh_examples()
        except DatabaseUnavailable as error:
            # The row is stored, and that is what was asked for.
            log.error("the examples are not refreshed: %s", error.detail)
            self._stale.set()
            return None
        example = self._corrected.get(feedback.transaction_id)
        return example == feedback.corrected_proposal

    async def append(self, row: OrchestratorRunSchema | HermesScoreSchema | ProposalSchema) -> None:
        """Stores a row; raises DatabaseUnavailable where that is not possible."""
        await self._store.append(row)
        if isinstance(row, HermesScoreSchema):
            self._stale.set()

    async def _keep_fresh(self) -> None:
        said = None
        while True:
            self._stale.clear()
            try:
                await self._store.opened(_REFRESH_SECONDS)
                await self._refresh_examples()
                since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=24)
                self.mean_score, self.num_scores = await self._store.mean_score_since(since)
            except DatabaseUnavailable as error:
                # It says so itself while it is away; here only what is new.
                if said != error.detail:
                    log.error("what is kept in memory is not refreshed: %s", error.detail)
                said = error.detail
                await asyncio.sleep(_RETRY_PAUSE)
                continue
            except Exception:  # what is in memory would stay as it is for good
                log.exception("what is kept in memory is not refreshed")
                await asyncio.sleep(_RETRY_PAUSE)
                continue
            said = None
            # A burst of scores is read once.
            await asyncio.sleep(_REFRESH_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_SECONDS):
                    await self._stale.wait()

    async def _refresh_examples(self) -> None:
        if not self._max_examples:
            return
        newest_first = await self._store.recent_corrections(4 * self._max_examples)
        usable = [
            (transaction_id, Example(prompt, corrected))
            for prompt, corrected, transaction_id in newest_first
            # Older versions stored what is no text.
            if len(prompt) <= _LONGEST_EXAMPLE and not find_fault(prompt) and is_valid(corrected)
        ][: self._max_examples]
        before, self.examples = self.examples, tuple(e for _, e in reversed(usable))
        if self.examples != before:
            self._on_examples()
        self._corrected = {name: example.proposal for name, example in usable}
