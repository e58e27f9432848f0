"""What one request makes durable at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_sidecar.cloud_event import CloudEvent

if TYPE_CHECKING:
    from llm_sidecar.db.store import AnyRow


@dataclass(frozen=True, slots=True)
class RequestKey:
    """An `Idempotency-Key` of one caller.

    Attributes:
        caller: the name of the API key, or an empty string without one.
        key: the value of the header.
    """

    caller: str
    key: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request with an `Idempotency-Key` has come.

    Attributes:
        request: whose progress it is; `Store.claim` must have returned it.
        state: JSON text of the service, from which a repeated request goes on; None to keep it.
        response: the whole answer as bytes, once there is one.
    """

    request: RequestKey
    state: str | None = None
    response: bytes | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that the caller has to answer: with the response, if it has one.

    Attributes:
        state: the progress of an earlier attempt that died or failed; None for a new request.
        response: the whole answer of an earlier attempt; None if the caller has to make it.
    """

    state: str | None = None
    response: bytes | None = None


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
