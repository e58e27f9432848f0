"""Feedback on proposals, from people and from other services."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Final

from pydantic import ValidationError

from llm_sidecar.db import (
    FeedbackWithdrawalSchema,
    Phi3FeedbackSchema,
    PublishedFeedback,
    Store,
)
from llm_sidecar.db.transaction import Transaction
from llm_sidecar.errors import DatabaseUnavailable, NotFound
from llm_sidecar.event_bus import EventBus
from llm_sidecar.event_bus.consumer_group import Entry
from llm_sidecar.input_model import check_length, longest_payload, summary
from llm_sidecar.services.events import FEEDBACK_SUBMITTED, FeedbackSubmitted, cloud_event
from llm_sidecar.services.example_rules import Outcome
from llm_sidecar.services.few_shot import FewShotExamples
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.text import find_fault

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
"""Seconds after which feedback that could not be stored is tried again."""
_CHUNK: Final = 100
"""Number of messages that are parsed without a pause for other tasks; this takes about 10 ms."""
_LONGEST_ENTRY_ID: Final = 256
"""Maximum number of characters in the `id` of an inbox entry."""
_REPLACEMENT: Final = "\ufffd"
"""Stands for bytes that are not UTF-8, so different ids would be the same text."""


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
            bus: brings the feedback of other services.
            few_shot: the examples, refreshed after each change.
            max_chars: maximum number of characters in a text of a message.
            examples_from_bus: whether published feedback can be an example.
        """
        self._store = store
        self._bus = bus
        self._few_shot = few_shot
        self._max_chars = max_chars
        self._examples_from_bus = examples_from_bus

    async def subscribe(self) -> None:
        """Starts to store the feedback that other services send, over the channel and the inbox."""
        await self._bus.subscribe_batches(FEEDBACK_SUBMITTED, self._store_published)
        await self._bus.read_inbox(self._store_entries)

    async def submit(
        self, feedback: Phi3FeedbackSchema, author: str | None, attempt: Attempt
    ) -> tuple[str, Outcome]:
        """Stores feedback together with its event.

        Args:
            feedback: what to store.
            author: the name of the API key that it came with.
            attempt: at the request.

        Returns:
            Its feedback_id, and whether it is a few-shot example or the reason why not.

        Raises:
            DatabaseUnavailable: it is not stored.
        """
        if attempt.state is not None:
            # An earlier attempt has stored it. Its id may depend on the time of that attempt.
            feedback = feedback.model_copy(update=attempt.state)
        else:
            if "timestamp" not in feedback.model_fields_set:
                # Part of the default id, which has to be the same in every attempt.
                feedback = feedback.model_copy(update={"timestamp": attempt.begun})
            await attempt.tasks.finish(self._submit(feedback.written_by(author), author, attempt))
        return feedback_id_of(feedback), await self._few_shot.outcome(feedback)

    async def _submit(
        self, feedback: Phi3FeedbackSchema, author: str | None, attempt: Attempt
    ) -> None:
        # The event carries the id, so that its receivers store it once.
        feedback_id = feedback_id_of(feedback)
        values = feedback.model_dump() | {
            "feedback_id": feedback_id,
            "stored_in": await self._store.id(),
        }
        if author is not None:
            # Omitted otherwise, because version 0.1.0 refuses the field.
            values["author"] = author
        event = cloud_event(FeedbackSubmitted(**values), attempt.id)
        progress = attempt.progress({"feedback_id": feedback_id})
        await self._store.commit(Transaction([feedback], [event], progress))

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
        row = FeedbackWithdrawalSchema(feedback_id=feedback_id, transaction_id=transaction_id)
        await self._store.commit(Transaction([row]))
        await self._few_shot.withdraw(feedback_id)

    async def _store_published(self, payloads: Sequence[str]) -> None:
        """Stores the feedback in messages of other services.

        Their publishers do not send it again. So later messages wait until the database accepts
        these.
        """
        for start in range(0, len(payloads), _CHUNK):
            rows = []
            for payload in payloads[start : start + _CHUNK]:
                try:
                    rows.append(self._read(payload))
                except _Refused as refusal:
                    self._bus.refuse(FEEDBACK_SUBMITTED, refusal.reason)
            await self._store_patiently([row for row in rows if row is not None])
            self._refresh_examples(rows)

    async def _store_entries(self, entries: Sequence[Entry]) -> Sequence[str | None]:
        """Stores the feedback in entries of the inbox.

        Returns:
            For each entry None, or why it is not stored.

        Raises:
            DatabaseUnavailable: not every entry is stored; a retry stores none twice.
        """
        refusals: list[str | None] = []
        for start in range(0, len(entries), _CHUNK):
            refusals += await self._store_chunk(entries[start : start + _CHUNK])
        return refusals

    async def _store_chunk(self, entries: Sequence[Entry]) -> list[str | None]:
        refusals: list[str | None] = []
        rows = []
        for entry in entries:
            try:
                rows.append(self._read_entry(entry))
                refusals.append(None)
            except _Refused as refusal:
                refusals.append(refusal.reason)
        # At once, because the journal commits in groups.
        await asyncio.gather(*(self._store_row(row) for row in rows if row is not None))
        self._refresh_examples(rows)
        return refusals

    def _read_entry(self, entry: Entry) -> PublishedFeedback | None:
        """The feedback in an entry, which is stored once by the entry's `id`."""
        if entry.fields.get("type") != FEEDBACK_SUBMITTED:
            raise _Refused(f"type: Input should be {FEEDBACK_SUBMITTED}")
        entry_id = entry.fields.get("id", "")
        if not 0 < len(entry_id) <= _LONGEST_ENTRY_ID or find_fault(entry_id):
            raise _Refused(f"id: Input should be text of 1 to {_LONGEST_ENTRY_ID} characters")
        data = entry.fields.get("data", "")
        for name, text in (("id", entry_id), ("data", data)):
            if _REPLACEMENT in text:
                raise _Refused(f"{name}: Input should be UTF-8 without U+FFFD")
        feedback = self._read(data)
        return None if feedback is None else feedback.from_entry(entry_id)

    def _read(self, payload: str) -> PublishedFeedback | None:
        """The feedback in a payload; None if a sidecar has already stored it in the same database.
        `stored_in` says so; a payload that forges it is not stored.

        Raises:
            _Refused: it is invalid.
        """
        if len(payload) > longest_payload(self._max_chars):
            raise _Refused("it is too long")
        try:
            feedback = PublishedFeedback.model_validate_json(payload)
            check_length(feedback, self._max_chars)
        except ValidationError as error:
            if self._is_stored(_stored_in(payload)):
                # Its time is in the future if the clock has been set back since.
                return None
            raise _Refused(summary(error)) from None
        if self._is_stored(feedback.stored_in):
            return None
        if feedback.feedback_id is None and not json.loads(payload).get("timestamp"):
            # Each sidecar that receives it sets another time, so the id must not depend on the
            # time.
            feedback_id = hashlib.sha256(payload.encode()).hexdigest()
            feedback = feedback.model_copy(update={"feedback_id": feedback_id})
        return feedback

    def _is_stored(self, stored_in: str | None) -> bool:
        return stored_in is not None and self._store.has_id(stored_in)

    def _refresh_examples(self, received: Sequence[PublishedFeedback | None]) -> None:
        """Refreshes the examples if this feedback may change them. None stands for feedback that
        another sidecar has stored."""
        if any(row is None or self._examples_from_bus for row in received):
            self._few_shot.refresh_soon()

    async def _store_row(self, feedback: PublishedFeedback) -> None:
        await self._store.commit(Transaction([feedback]))

    async def _store_patiently(self, rows: Sequence[PublishedFeedback]) -> None:
        """Retries until the database has accepted every row."""
        logged = False
        while rows:
            # At once, because the journal commits in groups.
            results = await asyncio.gather(*map(self._store_row, rows), return_exceptions=True)
            rows = [row for row, result in zip(rows, results, strict=True) if result is not None]
            for failure in filter(None, results):
                if not isinstance(failure, DatabaseUnavailable):
                    raise failure
                if not logged:
                    log.error("feedback of another service waits: %s", failure.detail)
                logged = True
            if rows:
                await asyncio.sleep(_RETRY_SECONDS)


def feedback_id_of(feedback: Phi3FeedbackSchema) -> str:
    """The id of feedback, as it is stored."""
    return str(feedback.as_row()["feedback_id"])


def _stored_in(payload: str) -> str | None:
    """The `stored_in` of a payload that may not be valid."""
    try:
        stored_in = json.loads(payload)["stored_in"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return stored_in if isinstance(stored_in, str) else None


class _Refused(Exception):
    """A message is invalid.

    Attributes:
        reason: what is wrong with it, without any text of the message.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
