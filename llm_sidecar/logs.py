"""How log lines look: JSON for machines, text for people.

A module logs as ever; what identifies the work at hand is added to each of its lines:

    log_context.set({**log_context.get(), "trace_id": trace_id})
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final, Literal

LogFormat = Literal["auto", "json", "text"]

log_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=MappingProxyType({}))
"""Fields of every line of the request at hand, as `request_id` and `trace_id`: small texts, never a
prompt or a secret. Set a new mapping, do not change the one that is there."""

_OWN_ATTRIBUTES: Final = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's copy of the message with colours in it
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp (UTC, ISO 8601), level, logger, message, the context, the
    `extra` fields, and type and stack of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a value that is no JSON is shown as its `str`."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "timestamp": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **log_context.get(),
        }
        for name, value in record.__dict__.items():
            if name not in _OWN_ATTRIBUTES:
                line.setdefault(name, value)
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = {
                "type": record.exc_info[0].__qualname__,
                "stack": self.formatException(record.exc_info),
            }
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """One readable line, with the request's id where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is logging's
        """The line, to which `logging` adds an exception."""
        request_id = log_context.get().get("request_id")
        line = super().formatMessage(record)
        return line if request_id is None else f"{line} [{request_id}]"


def log_to_stderr(log_format: str) -> bool:
    """Gives the root logger a handler, unless whoever runs the process has done so.

    Args:
        log_format: a `LogFormat`; anything else counts as `auto`.

    Returns:
        Whether it has one of ours now.
    """
    root = logging.getLogger()
    if root.handlers:
        return False
    as_text = log_format == "text" or (log_format != "json" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root.addHandler(handler)
    return True
