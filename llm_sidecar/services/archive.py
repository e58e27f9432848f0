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
    Correction,
    FeedbackWithdrawalSchema,
    HermesScoreSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    PublishedFeedback,
    Store,
)
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.proposals import Example
from llm_sidecar.services.examples import (
    MAX_PROPOSAL_CHARS,
    MAX_TOKENS,
    Outcome,
    choose,
    proposal_refusal,
    refusal,
)

log = logging.getLogger(__name__)

_REFRESH_SECONDS: Final = 30.0
"""Other processes write too, so what is kept in memory is read again this often."""
_REFRESH_PAUSE: Final = 0.5
_RETRY_PAUSE: Final = 1.0
_REFRESH_DEADLINE: Final = 8.0
"""Seconds to read the examples, including the wait for a read that is already running."""


class Archive:
    """Rows in, and the few questions that every request or probe asks, from memory.

    Attributes:
        corrections: the few-shot examples in use, oldest first.
        mean_score: mean of the last 24 hours' scores, or None.
        num_scores: their number.
    """

    def __init__(
        self,
        uri: str,
        *,
        log_dir: Path | None = None,
        examples: int,
        examples_from_bus: bool = False,
        context_length: Callable[[], int],
        on_examples: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens nothing.

        Args:
            uri: folder or object store of the database.
            log_dir: where the log of an object store goes.
            examples: greatest number of few-shot examples.
            examples_from_bus: whether feedback that another service published can be one.
            context_length: returns the model's context length in tokens; may read files.
            on_examples: is called when the examples have changed.
        """
        self.corrections: tuple[Correction, ...] = ()
        self.mean_score: float | None = None
        self.num_scores = 0
        self._max_examples = examples
        self._from_bus = examples_from_bus
        self._context_length = context_length
        self._on_examples = on_examples
        self._refreshing = asyncio.Lock()
        self._refreshes_asked = self._refreshes_done = 0
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
        self._task = start_detached(self._keep_fresh())

    async def close(self) -> None:
        """Closes the database; every row that was acknowledged is in it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._store.close()

    def status(self) -> dict[str, Any]:
        """The state for `/health`: JSON types only."""
        return self._store.status()

    def refusal(self) -> str | None:
        """Why rows cannot be stored now; None if they can."""
        return self._store.refusal()

    def is_whole(self) -> bool:
        """Whether rows can be stored and questions asked."""
        return self._store.is_open()

    @property
    def examples(self) -> tuple[Example, ...]:
        """The few-shot examples in use, oldest first."""
        return tuple(Example(c.prompt, c.proposal) for c in self.corrections)

    @property
    def database_id(self) -> str | None:
        """The database's own id, the same for every sidecar that uses it; None until it has been
        opened."""
        return self._store.database_id

    async def append_feedback(self, feedback: Phi3FeedbackSchema) -> Outcome:
        """Stores feedback; a correction can be a few-shot example from the next proposal on.

        Returns:
            Whether it is one, or the reason why not.

        Raises:
            DatabaseUnavailable: the row is not stored.
        """
        await self._store.append(feedback)
        if feedback.corrected_proposal is None:
            return Outcome.NO_CORRECTION
        if (refused := proposal_refusal(feedback.corrected_proposal)) is not None:
            return refused
        if not self._max_examples:
            return Outcome.OFF
        if not self._store.is_open():
            return Outcome.DATABASE_AWAY
        try:
            await self._refresh_examples()
            return await self._outcome(feedback, feedback.corrected_proposal)
        except DatabaseUnavailable as error:
            # The row is stored, and that is what was asked for.
            log.error("the examples are not refreshed: %s", error.detail)
            self.refresh_soon()
            return Outcome.DATABASE_AWAY

    async def _outcome(self, feedback: Phi3FeedbackSchema, corrected: dict[str, Any]) -> Outcome:
        """The outcome of a valid correction that was stored before the last refresh."""
        feedback_id = feedback.as_row()["feedback_id"]
        if any(used.feedback_id == feedback_id for used in self.corrections):
            return Outcome.EXAMPLE
        prompt = await self._store.prompt(feedback.transaction_id)
        if prompt is None:
            return Outcome.NO_RUN
        context_length = await asyncio.to_thread(self._context_length)
        if (refused := refusal(Example(prompt, corrected), context_length)) is not None:
            return refused
        if await self._store.is_withdrawn(feedback_id):
            return Outcome.WITHDRAWN
        if any(used.transaction_id == feedback.transaction_id for used in self.corrections):
            return Outcome.REPLACED
        return Outcome.CROWDED_OUT

    async def append_published(self, feedback: PublishedFeedback) -> None:
        """Stores feedback that another service published.

        Raises:
            DatabaseUnavailable: the row is not stored.
        """
        await self._store.append(feedback)
        if self._from_bus:
            self.refresh_soon()

    async def withdraw(self, feedback_id: str) -> bool:
        """Withdraws feedback: it is neither an example nor training data from then on.

        Returns:
            False if there is no such feedback.

        Raises:
            DatabaseUnavailable: the withdrawal is not stored, or it is not known whether there is
                such feedback.
        """
        transaction_id = next(
            (used.transaction_id for used in self.corrections if used.feedback_id == feedback_id),
            None,
        ) or await self._store.feedback_transaction(feedback_id)
        if transaction_id is None:
            return False
        await self._store.append(
            FeedbackWithdrawalSchema(feedback_id=feedback_id, transaction_id=transaction_id)
        )
        try:
            await self._refresh_examples()
        except DatabaseUnavailable:
            # The example that would replace it is not known now.
            self._use(tuple(c for c in self.corrections if c.feedback_id != feedback_id))
            self.refresh_soon()
        return True

    def refresh_soon(self) -> None:
        """Lets the background task read the examples and the mean score again."""
        self._stale.set()

    async def append(self, row: OrchestratorRunSchema | HermesScoreSchema | ProposalSchema) -> None:
        """Stores a row; raises DatabaseUnavailable where that is not possible."""
        await self._store.append(row)
        if isinstance(row, HermesScoreSchema):
            self.refresh_soon()

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
        """Reads the examples again, unless a read that began after this call has done so.

        Raises:
            DatabaseUnavailable: they cannot be read, and stay as they were.
        """
        if not self._max_examples:
            return
        self._refreshes_asked += 1
        mine = self._refreshes_asked
        try:
            async with asyncio.timeout(_REFRESH_DEADLINE), self._refreshing:
                # Otherwise a read that began after this call has finished meanwhile.
                if self._refreshes_done < mine:
                    begun = self._refreshes_asked
                    await self._read_examples()
                    self._refreshes_done = begun
        except TimeoutError:
            raise DatabaseUnavailable(
                f"The examples could not be read within {_REFRESH_DEADLINE:g} s.", retry_after=5
            ) from None

    async def _read_examples(self) -> None:
        context_length = await asyncio.to_thread(self._context_length)
        newest_first = await self._store.recent_corrections(
            self._max_examples,
            lambda correction: refusal(correction, context_length) is None,
            proposal_bytes=MAX_PROPOSAL_CHARS,
            prompt_bytes=MAX_TOKENS,
            from_bus=self._from_bus,
        )
        self._use(choose(newest_first, self._max_examples, context_length))

    def _use(self, corrections: tuple[Correction, ...]) -> None:
        before, self.corrections = self.corrections, corrections
        if corrections != before:
            self._on_examples()
