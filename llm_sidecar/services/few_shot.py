"""The few-shot examples: the latest corrections, which are in the prompt of every proposal.

A sidecar that has moved feedback to the database touches a fact in Redis, and every sidecar then
reads its examples again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from llm_sidecar.db import Correction, Phi3FeedbackSchema, Store
from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.facts import Fact
from llm_sidecar.proposals import Example
from llm_sidecar.services.example_rules import (
    MAX_PROPOSAL_CHARS,
    MAX_TOKENS,
    Outcome,
    proposal_refusal,
    refusal,
    select,
)
from llm_sidecar.services.refresh import REFRESH_SECONDS, Refresher

log = logging.getLogger(__name__)

FACT: Final = "feedback"
"""The fact that is touched when feedback, or a withdrawal, has reached the database."""
_READ_DEADLINE: Final = 8.0
"""Seconds to read the examples, including the wait for a read that is already running."""
_AGAIN_SECONDS: Final = 1.0
"""Seconds after a change by another sidecar until the examples are read once more: the run of a
correction may still be in a journal, whose sidecar moves it when it notices the change."""
_EVERY_WITHOUT_REDIS: Final = 2.0
"""Seconds between two refreshes while no sidecar can report changes."""


class FewShotExamples:
    """The examples in use, in memory.

    Attributes:
        corrections: the examples with their ids, oldest first.
    """

    def __init__(
        self,
        store: Store,
        bus: EventBus,
        *,
        count: int,
        from_bus: bool,
        context_length: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        """Does no I/O yet.

        Args:
            store: the database.
            bus: reports changes by other sidecars.
            count: maximum number of examples.
            from_bus: whether feedback that another service published can be one.
            context_length: returns the model's context length in tokens; may read files.
            on_change: is called when the examples have changed.
        """
        self.corrections: tuple[Correction, ...] = ()
        self._store = store
        self._bus = bus
        self._count = count
        self._from_bus = from_bus
        self._context_length = context_length
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._reads_asked = self._reads_done = 0
        self._refresher = Refresher(
            "the few-shot examples", self._refresh_when_open, self._seconds_between_refreshes
        )

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples in use, oldest first."""
        return tuple(Example(c.prompt, c.proposal, c.feedback_id) for c in self.corrections)

    def start(self) -> None:
        """Starts to refresh the examples from the database."""
        self._bus.watcher.watch(FACT, self._others_changed)
        self._refresher.start()

    async def close(self) -> None:
        """Stops refreshing; keeps the current examples."""
        await self._refresher.close()

    def refresh_soon(self) -> None:
        """Requests a refresh in the background."""
        self._refresher.soon()

    async def outcome(self, feedback: Phi3FeedbackSchema) -> Outcome:
        """Whether feedback that has just been stored is an example, or the reason why not."""
        if feedback.corrected_proposal is None:
            return Outcome.NO_CORRECTION
        if (refused := proposal_refusal(feedback.corrected_proposal)) is not None:
            return refused
        if not self._count:
            return Outcome.OFF
        if not self._store.is_open():
            return Outcome.DATABASE_AWAY
        try:
            await self._refresh()
            return await self._outcome(feedback, feedback.corrected_proposal)
        except DatabaseUnavailable as error:
            # The feedback itself is stored, so the request does not fail.
            log.error("the examples are not refreshed: %s", error.detail)
            self.refresh_soon()
            return Outcome.DATABASE_AWAY

    async def withdraw(self, feedback_id: str) -> None:
        """Removes the example of feedback whose withdrawal has just been stored."""
        try:
            await self._refresh()
        except DatabaseUnavailable:
            # Only a refresh shows which example replaces it.
            self._use(tuple(c for c in self.corrections if c.feedback_id != feedback_id))
            self.refresh_soon()

    async def _outcome(self, feedback: Phi3FeedbackSchema, corrected: dict[str, Any]) -> Outcome:
        """The outcome of a valid correction that was stored before the last refresh."""
        feedback_id = feedback.as_row()["feedback_id"]
        if self._uses(feedback_id):
            return Outcome.EXAMPLE
        prompt = await self._store.prompt(feedback.transaction_id)
        if prompt is None:
            return Outcome.NO_RUN
        context_length = await asyncio.to_thread(self._context_length)
        if (refused := refusal(Example(prompt, corrected), context_length)) is not None:
            return refused
        if await self._store.is_withdrawn(feedback_id):
            return Outcome.WITHDRAWN
        # The run may have come from another machine since the last refresh.
        await self._refresh()
        if self._uses(feedback_id):
            return Outcome.EXAMPLE
        if any(used.transaction_id == feedback.transaction_id for used in self.corrections):
            return Outcome.REPLACED
        return Outcome.CROWDED_OUT

    def _uses(self, feedback_id: str) -> bool:
        return any(used.feedback_id == feedback_id for used in self.corrections)

    def _others_changed(self, _: Fact) -> None:
        self.refresh_soon()
        asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self.refresh_soon)

    def _seconds_between_refreshes(self) -> float:
        return REFRESH_SECONDS if self._bus.connected else _EVERY_WITHOUT_REDIS

    async def _refresh_when_open(self) -> None:
        await self._store.opened(REFRESH_SECONDS)
        await self._refresh()

    async def _refresh(self) -> None:
        """Reads the examples again, unless another read has begun since this call and succeeded.

        Raises:
            DatabaseUnavailable: they cannot be read, and stay as they were.
        """
        if not self._count:
            return
        self._reads_asked += 1
        mine = self._reads_asked
        try:
            async with asyncio.timeout(_READ_DEADLINE), self._lock:
                if self._reads_done < mine:
                    begun = self._reads_asked
                    await self._read()
                    self._reads_done = begun
        except TimeoutError:
            raise DatabaseUnavailable(
                f"The examples could not be read within {_READ_DEADLINE:g} s.", retry_after=5
            ) from None

    async def _read(self) -> None:
        context_length = await asyncio.to_thread(self._context_length)
        newest_first = await self._store.recent_corrections(
            self._count,
            lambda correction: refusal(correction, context_length) is None,
            proposal_bytes=MAX_PROPOSAL_CHARS,
            prompt_bytes=MAX_TOKENS,
            from_bus=self._from_bus,
        )
        self._use(select(newest_first, self._count, context_length))

    def _use(self, corrections: tuple[Correction, ...]) -> None:
        before, self.corrections = self.corrections, corrections
        if corrections != before:
            self._on_change()
