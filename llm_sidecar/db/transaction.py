"""What one request commits together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.journal.requests import REUSED, Claim, Progress, RequestKey

if TYPE_CHECKING:
    from llm_sidecar.db.store import AnyRow

__all__ = ["REUSED", "Claim", "Progress", "RequestKey", "Transaction"]


@dataclass(frozen=True, slots=True)
class Transaction:
    """Rows, events and the progress of one request, all of them durable or none.

    Attributes:
        rows: for the tables; a row whose key the journal has already is ignored.
        events: for the outbox, in this order.
        progress: of the request, if it has an `Idempotency-Key`.
        draft: an id; the rows are a draft, which stays in the journal for some minutes.
        replaces: the id of a draft, whose rows are deleted if they are still in the journal.
    """

    rows: Sequence[AnyRow] = ()
    events: Sequence[CloudEvent] = ()
    progress: Progress | None = None
    draft: str | None = None
    replaces: str | None = None
