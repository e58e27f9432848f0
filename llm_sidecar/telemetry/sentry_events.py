"""Filters the fields of a Sentry event that may leave the process.

Allowed are names, locations, lines of our source and tags, and an exception's type and stack trace.
An exception's text and variables may quote a prompt, so they are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

_EVENT: Final = (
    *("event_id", "timestamp", "start_timestamp", "platform", "level", "environment", "release"),
    *("server_name", "sdk", "type", "message", "tags", "transaction", "transaction_info"),
)
_EXCEPTION: Final = ("type", "module", "mechanism")
_FRAME: Final = (
    *("filename", "abs_path", "function", "module", "lineno", "in_app"),
    *("pre_context", "context_line", "post_context"),
)
_TRACE: Final = ("trace_id", "span_id", "parent_span_id", "op", "status", "origin")
_SPAN: Final = (*_TRACE, "description", "start_timestamp", "timestamp")


def allowed(event: Event, hint: Hint) -> Event:
    """A new event with only the allowed fields."""
    kept: dict[str, Any] = _pick(event, _EVENT)
    kept["contexts"] = {"trace": _pick(event.get("contexts", {}).get("trace", {}), _TRACE)}
    if "exception" in event:
        values = event["exception"]["values"]
        kept["exception"] = {"values": [_exception(value) for value in values]}
    if "spans" in event:
        kept["spans"] = [_pick(span, _SPAN) for span in event["spans"]]  # type: ignore[union-attr]
    return kept  # type: ignore[return-value]


def _exception(value: Mapping[str, Any]) -> dict[str, Any]:
    frames = (value.get("stacktrace") or {}).get("frames", [])
    return {
        **_pick(value, _EXCEPTION),
        "stacktrace": {"frames": [_pick(frame, _FRAME) for frame in frames]},
    }


def _pick(source: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: source[name] for name in names if name in source}
