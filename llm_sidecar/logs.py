"""The format of log lines (JSON for machines, text for people), and the request they belong to.

A module logs as usual; the fields of `log_context` are added to each line:

    fields = {"request_id": request_id}
    log_context.set(fields)
    ...
    fields.clear()  # the request has ended

asyncio copies the current context to each new task, timer and connection. Some of these outlive the
request and do not belong to it. So the server clears the fields at the end of a request. Work that
outlives a request starts with `start_detached` if it belongs to no request, or with `start_owned`
if it still belongs to this one and keeps its id.
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import json
import logging
import sys
import traceback
from collections.abc import Coroutine, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

from llm_sidecar.errors import SidecarError

T = TypeVar("T")

log = logging.getLogger(__name__)

LogFormat = Literal["auto", "json", "text"]

log_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=MappingProxyType({}))
"""Fields of all log lines of the current request, such as `request_id`: short texts, never a prompt
or a secret."""


def start_detached(work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
    """Starts a task that belongs to no request: its log lines have no request id, and its spans
    belong to no request's trace."""
    return asyncio.create_task(work, name=name, context=contextvars.Context())


def start_owned(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task of the current request that may outlive it: its log lines keep the request's
    id."""
    context, fields = contextvars.copy_context(), dict(log_context.get())
    context.run(log_context.set, fields)
    task = asyncio.create_task(work, context=context)
    # Connections that the work has opened may outlive it and still hold the fields.
    task.add_done_callback(lambda _: fields.clear())
    return task


_OWN_ATTRIBUTES: Final = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's copy of the message with colours in it
}


def stack(error: BaseException) -> str:
    """An error's traceback after those of its causes, without messages, which may quote a prompt.

    Messages of the operating system and of `llm_sidecar.errors` quote none, so they are kept.
    """
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        # A chain of causes may be a loop.
        if current is None or any(current is other for other in found):
            continue
        found.append(current)
        waiting.append(current.__cause__)
        if not current.__suppress_context__:
            waiting.append(current.__context__)
        waiting.extend(getattr(current, "exceptions", ()))
    return "\n".join(map(_raised, reversed(found)))


def _raised(error: BaseException) -> str:
    said = type(error).__qualname__
    if isinstance(error, SidecarError):
        said = f"{said}: {error.detail}"
    elif isinstance(error, OSError) and error.strerror:
        said = f"{said}: {error.strerror}"
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{where}{said}"


def log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an unhandled exception; for `loop.set_exception_handler`.

    asyncio's own handler also logs the task, whose text includes the error's message.
    """
    error = context.get("exception")
    log.error("%s\n%s", context["message"], "" if error is None else stack(error))


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802  the name is logging's
        """The exception of a record, without its message."""
        return stack(ei[1])


class JsonFormatter(_Formatter):
    """One JSON object a line: timestamp (UTC, ISO 8601), level, logger, message, the context, the
    `extra` fields, and type and stack of an exception, without its message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a value that JSON does not know is shown as its `str`."""
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


class TextFormatter(_Formatter):
    """One readable line, with the id of the request if it belongs to one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is logging's
        """The line, to which `logging` adds an exception."""
        request_id = log_context.get().get("request_id")
        line = super().formatMessage(record)
        return line if request_id is None else f"{line} [{request_id}]"


def log_to_stderr(log_format: str) -> bool:
    """Gives the root logger a handler, unless it has one.

    Args:
        log_format: a `LogFormat`; anything else counts as `auto`.

    Returns:
        Whether it has added one.
    """
    root = logging.getLogger()
    if root.handlers:
        return False
    as_text = log_format == "text" or (log_format != "json" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root.addHandler(handler)
    return True
