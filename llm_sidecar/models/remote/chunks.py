"""Reads the events of streamed completions, as leniently as is safe.

Servers differ: text may be null or a list of parts, counts may be missing, and there may be unknown
fields. A value of an unexpected type counts as absent. Only data that is not a JSON object and an
error of the server end the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from llm_sidecar.engines.base import FinishReason, TokenLogprob
from llm_sidecar.engines.outputs import LEAST_LOGPROB
from llm_sidecar.models.remote.refusals import InvalidAnswer, broken, error_in_stream
from llm_sidecar.text import cleaned

_END: Final = b"[DONE]"
_LENGTH: Final = frozenset({"length", "max_tokens", "model_length"})
_FAILED: Final = frozenset({"abort", "error"})
_FILTERED: Final = "content_filter"
"""The finish reason if the server withholds the text, or the rest of it."""
_MOST_TOKENS: Final = 1 << 31
"""No context is as long. A larger count would overflow the counters of the metrics."""
MOST_LIKELY: Final = 20
"""Maximum number of most likely tokens at a position, as in OpenAI's API; others are dropped."""
UNKNOWN_ID: Final = -1
"""The id of a token for which the server returns only the text."""


class _Message(msgspec.Struct):
    content: Any = None


class _Choice(msgspec.Struct):
    index: Any = None
    delta: _Message | None = None
    message: _Message | None = None
    text: Any = None
    finish_reason: Any = None
    logprobs: Any = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


_DECODER: Final = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion, or a whole one.

    Attributes:
        text: see `llm_sidecar.text`.
        finish_reason: None before the end.
        usage: None in most chunks, and on some servers in all.
        is_end: whether nothing follows.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None
    is_end: bool = False


def read_chunk(server: str, data: bytes) -> Chunk:
    """The chunk in the data of an event, or in the body of an answer.

    Args:
        server: the subject of the errors' sentences.

    Raises:
        InvalidAnswer: it is not an object of the protocol, or the server aborted the completion.
        SidecarError: the server reports an error, or withholds the text or the rest of it.
    """
    if data == _END:
        return Chunk(is_end=True)
    try:
        answer = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise _unreadable(server, "not an object of the protocol") from None
    # One choice is requested. Servers that leave out its number send no other.
    choice = next((choice for choice in answer.choices or () if not choice.index), _Choice())
    reason = choice.finish_reason if isinstance(choice.finish_reason, str) else ""
    if reason in _FAILED:
        raise _unreadable(server, "the server gave the completion up")
    # Servers that filter the prompt answer with status 400.
    if error := {"code": 400} if reason == _FILTERED else answer.error:
        raise error_in_stream(server, error)
    message = choice.delta or choice.message
    return Chunk(
        cleaned(_text(choice.text if message is None else message.content)),
        _finish_reason(reason),
        _logprobs(choice.logprobs),
        _usage(answer.usage),
    )


def _unreadable(server: str, why: str) -> InvalidAnswer:
    return broken(server, f"sends an answer that cannot be read ({why})")


def _text(content: Any) -> str:
    """A text, or the joined texts of a list of parts."""
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in parts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _finish_reason(reason: str) -> FinishReason | None:
    if not reason:
        return None
    return "length" if reason in _LENGTH else "stop"


def _usage(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(cached)
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0


def _logprobs(sent: Any) -> tuple[TokenLogprob, ...]:
    """Log probabilities of chat completions (`content`), or of completions (parallel lists)."""
    if not isinstance(sent, dict):
        return ()
    content = sent.get("content")
    if isinstance(content, list):
        return tuple(_token(entry) for entry in content if isinstance(entry, dict))
    return _legacy_logprobs(sent)


def _token(entry: Mapping[str, Any]) -> TokenLogprob:
    top = entry.get("top_logprobs")
    others = [other for other in top if isinstance(other, dict)] if isinstance(top, list) else []
    number = entry.get("id")
    return TokenLogprob(
        number if isinstance(number, int) else UNKNOWN_ID,
        _bytes(entry),
        _logprob(entry.get("logprob")),
        tuple(_token(other) for other in others[:MOST_LIKELY] if "top_logprobs" not in other),
    )


def _bytes(entry: Mapping[str, Any]) -> bytes:
    """The bytes of a token, which its text may hold only in part."""
    values = entry.get("bytes")
    if isinstance(values, list) and values:
        try:
            return bytes(values)
        except (ValueError, TypeError):
            pass
    return _text(entry.get("token")).encode(errors="replace")


def _legacy_logprobs(sent: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    tokens, values, tops = (
        value if isinstance(value := sent.get(name), list) else []
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    tops = [*tops, *[None] * (len(tokens) - len(tops))]
    return tuple(
        TokenLogprob(
            UNKNOWN_ID,
            _text(token).encode(errors="replace"),
            _logprob(value),
            tuple(
                TokenLogprob(UNKNOWN_ID, other.encode(errors="replace"), _logprob(logprob))
                for other, logprob in itertools.islice(
                    top.items() if isinstance(top, dict) else (), MOST_LIKELY
                )
            ),
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    )


def _logprob(value: Any) -> float:
    """At most 0; a value that is not a number counts as impossible."""
    if isinstance(value, int | float) and value <= 0.0:
        # An integer may be too large for a float.
        return float(max(LEAST_LOGPROB, value))
    # Rounding can take the logarithm of 1 a little above 0.
    return 0.0 if isinstance(value, int | float) and value < 0.01 else LEAST_LOGPROB
