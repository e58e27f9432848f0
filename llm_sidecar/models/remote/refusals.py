"""The errors of a request that a server refuses, or cannot receive."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import re
from collections.abc import Mapping
from typing import Any, Final

import httpx

from llm_sidecar.errors import InvalidRequest, ModelUnavailable, QueueFull, SidecarError
from llm_sidecar.models.base import RefusedRequest

_LONGEST_RETRY: Final = 3600
_TOO_LONG: Final = re.compile(
    rb"context (?:length|size|window)|context_length|exceed_context|max_model_len|too long"
    rb"|longer than the model",
    re.IGNORECASE,
)
"""Says that a prompt does not fit: llama.cpp, Ollama, OpenAI, SGLang, vLLM, other sidecars."""
_OF_REQUEST: Final = (400, 413, 422)
"""The statuses that blame the content of a request."""
_STATUS: Final = re.compile(r"[45][0-9]{2}")
_NAMED_STATUS: Final = {
    "invalid_request_error": 400,
    "model_not_found": 404,
    "rate_limit_exceeded": 429,
}
"""The statuses of codes and types of OpenAI's API, which other sidecars send too."""
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503


class Unreachable(ModelUnavailable):
    """No connection to the server can be made.

    Attributes:
        refused: whether the attempt failed, rather than took too long.
    """

    def __init__(self, detail: str, *, retry_after: int, refused: bool) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.refused = refused


class InvalidAnswer(ModelUnavailable):
    """The answer is unusable: truncated, too long, or not in the protocol."""


class Refused(ModelUnavailable):
    """The server refuses a request, for a reason other than its load or the request's content."""


def unreachable(server: str, error: Exception) -> Unreachable:
    """The error of a connection that cannot be made."""
    return Unreachable(
        f"{server} cannot be reached ({type(error).__name__}); start it, or correct its URL.",
        retry_after=5,
        refused=isinstance(error, httpx.ConnectError),
    )


def broken(server: str, how: str) -> InvalidAnswer:
    """The error of an unusable answer.

    Args:
        how: the predicate of the sentence whose subject is the server.
    """
    return InvalidAnswer(f"{server} {how}; try again.", retry_after=1)


def refusal(server: str, status: int, headers: Mapping[str, str], body: bytes) -> SidecarError:
    """The error for an answer whose status is not 200. It never quotes the body, which may quote a
    prompt.

    Args:
        server: the subject of the error's sentence.
        body: the beginning of the answer.
    """
    wait = retry_after(headers)
    if status == _TOO_MANY:
        wait = wait or 1
        return QueueFull(f"{server} is full; try again in {wait} s.", retry_after=wait)
    if status == _UNAVAILABLE:
        return ModelUnavailable(f"{server} is not available now (503).", retry_after=wait or 5)
    if status in _OF_REQUEST and _TOO_LONG.search(body):
        return InvalidRequest(
            "it is too long for the context of the model on the server",
            field="prompt",
            exceeds_context=True,
        )
    if status in _OF_REQUEST:
        return RefusedRequest(f"{server} refuses this request ({status}); its log says why.")
    return Refused(f"{server} {_meaning(status)}", retry_after=wait or 5)


def error_in_stream(server: str, error: Any) -> SidecarError:
    """The error for an error object in a stream, whose status was 200 already."""
    fields = error if isinstance(error, dict) else {"message": error}
    # Nested values are left out: they may be nested too deeply for a recursive function.
    texts = {name: str(value) for name, value in fields.items() if isinstance(value, str | int)}
    known = filter(None, (_status(texts.get(name, "")) for name in ("code", "type")))
    return refusal(server, next(known, 500), {}, "\n".join(texts.values()).encode(errors="replace"))


def _status(name: str) -> int | None:
    """The status that a code or a type means, or None."""
    return int(name) if _STATUS.fullmatch(name) else _NAMED_STATUS.get(name)


def retry_after(headers: Mapping[str, str]) -> int | None:
    """The seconds of a `Retry-After` header, which may also be a date; None without a valid one."""
    value = httpx.Headers(headers).get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return max(1, min(_LONGEST_RETRY, int(value[:9])))
    # The year may be too large for a date.
    with contextlib.suppress(ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(value)
        left = (date - datetime.datetime.now(date.tzinfo)).total_seconds()
        return max(1, min(_LONGEST_RETRY, round(left)))
    return None


def _meaning(status: int) -> str:
    if 300 <= status < 400:
        return f"redirects ({status}), which the sidecar does not follow; set the final URL."
    if status in (401, 403):
        return f"refuses the API key ({status}); set the key of the server."
    if status == 404:
        return "has no such path or model (404); the URL usually ends with /v1."
    return f"answers with status {status}; its log says why."
