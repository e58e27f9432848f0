"""Feedback on proposals, from people and from other services."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from typing import Final

from pydantic import ValidationError

from llm_sidecar.db import (
    FeedbackWithdrawalSchema,
    Phi3FeedbackSchema,
    PublishedFeedback,
    Store,
)
from llm_sidecar.errors import DatabaseUnavailable, NotFound
from llm_sidecar.event_bus import EventBus
from llm_sidecar.input_model import check_length, longest_payload, summary
from llm_sidecar.services.events import FEEDBACK_SUBMITTED, publish
from llm_sidecar.services.example_rules import Outcome
from llm_sidecar.services.few_shot import FewShotExamples

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
"""Seconds after which feedback that could not be stored is tried again."""


class Feedback:
    """Stores, publishes and withdraws feedback."""

    def __init__(
        self,
        store: Store,
        bus: EventBus,
        few_shot: FewShotExamples,
        *,
        max_chars: int,
        examples_from_bus: bool,
    ) -> None:
        """Subscribes to nothing yet.

        Args:
            store: the database.
            bus: carries feedback to and from other services.
            few_shot: the examples, refreshed after each change.
            max_chars: maximum number of characters in a text of a message.
            examples_from_bus: whether published feedback can be an example.
        """
        self._store = store
        self._bus = bus
        self._few_shot = few_shot
        self._max_chars = max_chars
        self._examples_from_bus = examples_from_bus
        # Marks this sidecar's own events until the database's id is known.
        self._sender_id = uuid.uuid4().hex

    async def subscribe(self) -> None:
        """Starts to store the feedback that other services publish."""
        await self._bus.subscribe(FEEDBACK_SUBMITTED, self._store_published)

    async def submit(
        self, feedback: Phi3FeedbackSchema, author: str | None = None
    ) -> tuple[str, Outcome]:
        """Stores feedback, then publishes it.

        Args:
            feedback: what to store.
            author: the name of the API key that it came with.

        Returns:
            Its feedback_id, and whether it is a few-shot example or the reason why not.

        Raises:
            DatabaseUnavailable: it is not stored.
        """
        feedback = feedback.written_by(author)
        # The event carries the id, so that its receivers store it once.
        feedback_id = str(feedback.as_row()["feedback_id"])
        await self._store.append(feedback)
        outcome = await self._few_shot.outcome(feedback)
        event = {
            "feedback_id": feedback_id,
            "stored_in": self._store.database_id or self._sender_id,
        }
        if author is not None:
            # Omitted otherwise, because version 0.1.0 refuses the field.
            event["author"] = author
        await publish(self._bus, FEEDBACK_SUBMITTED, feedback.model_dump(mode="json") | event)
        return feedback_id, outcome

    async def withdraw(self, feedback_id: str) -> None:
        """Withdraws feedback: it is neither a few-shot example nor training data from then on.

        Raises:
            NotFound: there is no such feedback.
            DatabaseUnavailable: the withdrawal is not stored, or it is not known whether there is
                such feedback.
        """
        transaction_id = next(
            (c.transaction_id for c in self._few_shot.corrections if c.feedback_id == feedback_id),
            None,
        ) or await self._store.feedback_transaction(feedback_id)
        if transaction_id is None:
            raise NotFound("There is no feedback with this feedback_id.")
        await self._store.append(
            FeedbackWithdrawalSchema(feedback_id=feedback_id, transaction_id=transaction_id)
        )
        await self._few_shot.withdraw(feedback_id)

    async def _store_published(self, payload: str) -> None:
        """Stores feedback that another service publishes.

        Feedback of a sidecar on the same database is stored already, so the message only refreshes
        the examples. A message with a forged `stored_in` is not stored.
        """
        if len(payload) > longest_payload(self._max_chars):
            self._bus.refuse(FEEDBACK_SUBMITTED, "it is too long")
            return
        try:
            feedback = PublishedFeedback.model_validate_json(payload)
            check_length(feedback, self._max_chars)
        except ValidationError as error:
            self._bus.refuse(FEEDBACK_SUBMITTED, summary(error))
            return
        own = (self._sender_id, self._store.database_id)
        if feedback.stored_in is not None and feedback.stored_in in own:
            self._few_shot.refresh_soon()
            return
        if feedback.feedback_id is None and not json.loads(payload).get("timestamp"):
            # Each sidecar that receives it sets another time, so the id must not depend on the
            # time.
            feedback_id = hashlib.sha256(payload.encode()).hexdigest()
            feedback = feedback.model_copy(update={"feedback_id": feedback_id})
        await self._append_with_retries(feedback)
        if self._examples_from_bus:
            self._few_shot.refresh_soon()

    async def _append_with_retries(self, feedback: PublishedFeedback) -> None:
        """Retries until the database accepts the feedback, because its publisher does not send it
        again.

        Later messages wait in the queue of the bus.
        """
        logged = False
        while True:
            try:
                await self._store.append(feedback)
            except DatabaseUnavailable as error:
                if not logged:
                    log.error("feedback of another service waits: %s", error.detail)
                logged = True
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return
