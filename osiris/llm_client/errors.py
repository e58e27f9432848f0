"""The errors that the clients raise."""

from __future__ import annotations

from typing import Any


class LLMClientError(Exception):
    """Base class of the clients' errors; raised itself if an answer cannot be parsed."""


class LLMClientConnectionError(LLMClientError):
    """The sidecar could not be reached, or the connection was lost, at every attempt."""


class LLMClientHTTPError(LLMClientError):
    """The sidecar answered the last attempt with an error.

    Attributes:
        status: the HTTP status.
        detail: the `detail` of the answer, or its text if it has none.
        request_id: the `X-Request-ID` under which the sidecar logged the request.
        retry_after: seconds that the answer asks to wait, or None.
        transaction_id: the id of the proposal that was stored before the error, or None.
    """

    def __init__(
        self,
        status: int,
        detail: Any,
        request_id: str,
        retry_after: float | None = None,
        transaction_id: str | None = None,
    ) -> None:
        super().__init__(f"HTTP {status}: {detail} (request {request_id})")
        self.status = status
        self.detail = detail
        self.request_id = request_id
        self.retry_after = retry_after
        self.transaction_id = transaction_id
