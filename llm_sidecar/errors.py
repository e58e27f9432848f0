"""Every error that the sidecar raises on purpose: one root class, and a subclass for each kind.

They know nothing of HTTP; `osiris.errors` maps each kind to an answer.
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass
from typing import Final, Self

_LONGEST_LINE: Final = 400
"""Characters of an error message that are shown."""


class SidecarError(Exception):
    """The root of all errors here; only subclasses are raised.

    Attributes:
        detail: one sentence for the caller: what is wrong and what to do; no prompt, no secret.
        retry_after: seconds after which the same request may succeed, or None.
        transaction_id: of a proposal that was stored before the error, or None.
        stored: False if a row of the failed request could not be stored.
    """

    def __init__(self, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.transaction_id: uuid.UUID | None = None
        self.stored = True

    def of_request(self, transaction_id: uuid.UUID | None, *, stored: bool) -> Self:
        """A copy for one request; several requests may share the original.

        Args:
            transaction_id: of the stored proposal, or None.
            stored: whether every row of the request is stored.
        """
        error = copy.copy(self)
        error.transaction_id, error.stored = transaction_id, stored
        return error


class SettingsError(SidecarError):
    """A setting has an invalid value."""


class CommandFailed(SidecarError):
    """A command of the command line cannot do its work; no HTTP request raises it."""


class InvalidRequest(SidecarError):
    """The request is well-formed but cannot be fulfilled.

    Attributes:
        problem: `detail` without the name of the field.
        field: what is wrong, as the services and engines call it, such as `prompt`, `schema` or
            `max_length`; None if it is not one field. A path may have another name for it.
        exceeds_context: whether the request does not fit the context of the model.
    """

    def __init__(
        self,
        problem: str,
        *,
        retry_after: int | None = None,
        field: str | None = None,
        exceeds_context: bool = False,
    ) -> None:
        detail = problem if field is None else f"{field}: {problem}"
        super().__init__(detail, retry_after=retry_after)
        self.problem = problem
        self.field = field
        self.exceeds_context = exceeds_context


class RequestKeyReused(SidecarError):
    """An `Idempotency-Key` belongs to another request."""


class NotFound(SidecarError):
    """The object that the request names does not exist."""


class AdapterRejected(SidecarError):
    """An adapter cannot be loaded; the one in use stays."""


class QueueFull(SidecarError):
    """The maximum number of requests is waiting already."""


class Unavailable(SidecarError):
    """A component that the request needs is missing, loading or broken."""


class ModelUnavailable(Unavailable):
    """A model is missing or loading, or its worker has just died."""


class VoiceUnavailable(Unavailable):
    """There is no voice, or its worker does not answer."""


class DatabaseUnavailable(Unavailable):
    """The database cannot be opened or written."""


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """Seconds that each phase of a model call took until the request's deadline passed.

    Attributes:
        before: earlier model calls of the request.
        waiting: queueing, and loading the model.
        prefill, decode: the phases of the generation.
    """

    before: float
    waiting: float
    prefill: float
    decode: float


class DeadlineExceeded(SidecarError):
    """The request took longer than its deadline.

    Attributes:
        spent: the phases of the model call that missed the deadline; None without such a call.
    """

    def __init__(
        self, detail: str, *, retry_after: int | None = None, spent: TimeSpent | None = None
    ) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.spent = spent


def one_line(error: Exception) -> str:
    """The message of an error, on one line of at most 400 characters without control characters."""
    text = error.detail if isinstance(error, SidecarError) else f"{type(error).__name__}: {error}"
    # An error may quote a name from a file.
    printable = (char if char.isprintable() else " " for char in text[:_LONGEST_LINE])
    return " ".join("".join(printable).split())
