"""The response headers, and how the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Final

from llm_sidecar.models.base import Completion
from llm_sidecar.services.score import Rating

_COUNT: Final = {"type": "integer", "minimum": 0}
_SHARE: Final = {"type": "number", "minimum": 0, "maximum": 1}
_TEXT: Final = {"type": "string"}


def _header(
    description: str, example: Any, schema: dict[str, Any], required: bool = False
) -> dict[str, Any]:
    return {
        "description": description,
        "required": required,
        "schema": schema,
        "example": example,
    }


HEADERS: Final[dict[str, dict[str, Any]]] = {
    "Idempotent-Replayed": _header(
        "`true` if this is the kept answer of an earlier request with the same `Idempotency-Key`; "
        "absent otherwise",
        "true",
        {"type": "string", "enum": ["true"]},
    ),
    "Retry-After": _header("Seconds after which the same request may succeed", 5, _COUNT),
    "WWW-Authenticate": _header(
        "How to send a key", 'Bearer realm="sidecar"', _TEXT, required=True
    ),
    "X-Completion-Tokens": _header("Tokens that were generated", 87, _COUNT, required=True),
    "X-Feedback-ID": _header(
        "The id of the stored feedback; `DELETE /feedback/{feedback_id}` needs it",
        "9f2c1d64a7d0",
        _TEXT,
        required=True,
    ),
    "X-Finish-Reason": _header(
        "Why the generation ended: `stop`, the model ended it; `length`, `max_length` was reached; "
        "`deadline`, the request's deadline passed and the text ends there",
        "stop",
        {"type": "string", "enum": ["stop", "length", "deadline"]},
        required=True,
    ),
    "X-Grounded": _header(
        "`true`, or the fields whose ticker or numbers are not in the prompt, separated by commas",
        "true",
        _TEXT,
    ),
    "X-Hermes-Answer-Mass": _header(
        "The total probability of the answers 0 to 10 as Hermes' answer; absent for a score by an "
        "older version",
        "0.981250",
        _SHARE,
    ),
    "X-Hermes-Score": _header(
        "Hermes' score of the proposal: 0 is worst, 1 is best",
        "0.750000",
        _SHARE,
        required=True,
    ),
    "X-Hermes-Score-Reliable": _header(
        "`false` if the answer mass is below `MIN_ANSWER_MASS`: Hermes would rather say something "
        "else, so the score means little and counts in no mean",
        "true",
        {"type": "string", "enum": ["true", "false"]},
        required=True,
    ),
    "X-Model": _header(
        "The model that answered, with its adapter if it has one", "phi3/phi3", _TEXT, required=True
    ),
    "X-Prompt-Tokens": _header(
        "Tokens of the prompt, with the system prompt and the examples", 412, _COUNT, required=True
    ),
    "X-Request-ID": _header(
        "The request's id, as sent or a new one; log lines have it too. Absent only if the "
        "server has too many connections or cannot read the request",
        "1b4e28ba-2fa1-41d2-883f-0016d3cca427",
        {"type": "string", "minLength": 1, "maxLength": 128},
    ),
    "X-Stored": _header(
        "`false` if a row of this request could not be stored; absent otherwise",
        "false",
        {"type": "string", "enum": ["false"]},
    ),
    "X-Voice": _header("The voice that spoke", "piper", _TEXT, required=True),
    "X-Voice-Reference": _header(
        "`ignored` if the reference was not used: this voice cannot imitate; absent otherwise",
        "ignored",
        {"type": "string", "enum": ["ignored"]},
    ),
    "traceresponse": _header(
        "The trace of the request in the format of W3C Trace Context, if tracing is on",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        _TEXT,
    ),
}

GENERATION: Final = ("X-Model", "X-Finish-Reason", "X-Prompt-Tokens", "X-Completion-Tokens")
"""The headers of every answer that a model generated."""
RATING: Final = ("X-Hermes-Answer-Mass", "X-Hermes-Score-Reliable")
"""The headers of every answer with a score."""


def declared(*names: str) -> dict[str, dict[str, str]]:
    """References to these headers, for the description of a response."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def declared_optional(*names: str) -> dict[str, dict[str, Any]]:
    """Like `declared`, for headers that some forms of the response lack."""
    return {name: {**HEADERS[name], "required": False} for name in names}


def generation_headers(completion: Completion) -> dict[str, str]:
    """The metadata of a generation, as response headers."""
    return {
        "X-Model": completion.model,
        "X-Finish-Reason": completion.finish_reason,
        "X-Prompt-Tokens": str(completion.prompt_tokens),
        "X-Completion-Tokens": str(completion.completion_tokens),
    }


def rating_headers(rating: Rating) -> dict[str, str]:
    """How far a score can be relied on, as response headers."""
    reliable = {"X-Hermes-Score-Reliable": "true" if rating.reliable else "false"}
    if rating.answer_mass is None:
        return reliable
    return {"X-Hermes-Answer-Mass": f"{rating.answer_mass:.6f}", **reliable}


def stored_header(stored: bool) -> dict[str, str]:
    """`X-Stored: false` if a row of the request could not be stored."""
    return {} if stored else {"X-Stored": "false"}
