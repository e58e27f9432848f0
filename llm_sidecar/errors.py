"""Every error the sidecar raises on purpose: one root, typed subclasses.

An error carries what its reader needs: a sentence that says what is wrong and what to do, the HTTP
status it maps to, and after how many seconds a retry makes sense.
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass
from typing import ClassVar, Final, Self

_LONGEST_LINE: Final = 400
"""Characters of an error message that are shown."""


class SidecarError(Exception):
    """Root of all errors here.

    Attributes:
        status: the HTTP status a server answers with.
        detail: one sentence for the caller; holds no prompt and no secret.
        retry_after: seconds after which the same request may succeed, or None.
        transaction_id: of the proposal that was stored before this error, or None.
        stored: False if a row of the failed request could not be stored.
    """

    status: ClassVar[int] = 500

    def __init__(self, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.transaction_id: uuid.UUID | None = None
        self.stored = True

    def of_request(self, transaction_id: uuid.UUID | None, *, stored: bool) -> Self:
        """A copy that says what is stored of one request; several requests may share the original.

        Args:
            transaction_id: of the stored proposal, or None.
            stored: whether every row of the request is stored.
        """
        error = copy.copy(self)
        error.transaction_id, error.stored = transaction_id, stored
        return error


class SettingsError(SidecarError):
    """An environment variable has a value that it cannot have."""


class InvalidRequest(SidecarError):
    """The request is well-formed but asks for something that cannot be done."""

    status = 422


class NotFound(SidecarError):
    """What the caller names does not exist."""

    status = 404


class AdapterRejected(SidecarError):
    """An adapter cannot be loaded; the one in use goes on."""

    status = 409


class QueueFull(SidecarError):
    """As many requests wait as may wait."""

    status = 429


class Unavailable(SidecarError):
    """A part that the request needs is missing, loading or broken."""

    status = 503


class ModelUnavailable(Unavailable):
    """A model is missing, loading or has just died."""


class VoiceUnavailable(Unavailable):
    """No voice can speak: it is missing, or its worker is."""


class DatabaseUnavailable(Unavailable):
    """The database cannot be opened or written."""


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """Seconds that each phase of a model call took until the request's deadline passed.

    Attributes:
        before: earlier model calls of the request.
        waiting: for a turn in the queue, and for the model to load.
        prompt: prefill.
        writing: decoding.
    """

    before: float
    waiting: float
    prompt: float
    writing: float


class DeadlineExceeded(SidecarError):
    """The request took longer than its deadline.

    Attributes:
        spent: the phases of the model call that missed the deadline; None if there was none.
    """

    status = 504

    def __init__(
        self, detail: str, *, retry_after: int | None = None, spent: TimeSpent | None = None
    ) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.spent = spent


def one_line(error: Exception) -> str:
    """What an error says, on one line of at most 400 characters without control characters."""
    text = error.detail if isinstance(error, SidecarError) else f"{type(error).__name__}: {error}"
    # An error may quote a name from a file.
    printable = (char if char.isprintable() else " " for char in text[:_LONGEST_LINE])
    return " ".join("".join(printable).split())
