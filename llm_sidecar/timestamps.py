"""Timestamps that callers send: ISO 8601, kept in UTC, at most a little in the future."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Strict, WithJsonSchema

_ZONE: Final = r"([Zz]|[+-][0-9]{2}(:?[0-9]{2})?)?"
_EXTENDED: Final = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    rf"([Tt ][0-9]{{2}}(:[0-9]{{2}}(:[0-9]{{2}}([.,][0-9]{{1,9}})?)?)?{_ZONE})?"
)
_BASIC: Final = rf"[0-9]{{8}}[Tt][0-9]{{2}}([0-9]{{2}}([0-9]{{2}}([.,][0-9]{{1,9}})?)?)?{_ZONE}"
ISO_8601: Final = rf"^({_EXTENDED}|{_BASIC})$"
"""A calendar date, with or without a time, in ISO 8601's extended format, or a date and time in its
basic format. A date alone in the basic format is not accepted: its digits may mean seconds."""
_PATTERN: Final = re.compile(ISO_8601)
_SPANS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
MAX_AHEAD: Final = datetime.timedelta(minutes=5)
"""The maximum time that a caller's clock may be ahead of this one."""


def now() -> datetime.datetime:
    """The current time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def since(text: str) -> datetime.datetime:
    """Parses a time on a command line: ISO 8601 (UTC if it has no offset), or an age such as 7d.

    Raises:
        ValueError: it is neither; the message is a sentence.
    """
    try:
        if text[-1:] in _SPANS:
            return now() - datetime.timedelta(**{_SPANS[text[-1]]: float(text[:-1])})
        found = datetime.datetime.fromisoformat(text)
        aware = found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found
        return aware.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time such as 2026-01-31 or 7d.") from None


def _read(value: object) -> object:
    """Text becomes a time; `date` and `datetime` objects stay as they are."""
    if isinstance(value, datetime.date):
        return value
    if isinstance(value, str) and _PATTERN.fullmatch(value):
        try:
            return datetime.datetime.fromisoformat(value.upper())
        except ValueError:
            pass
    raise ValueError(
        "must be ISO 8601 with a full date, such as 2026-01-31T10:00:00Z or 20260131T100000Z"
    )


def _as_utc(value: datetime.datetime) -> datetime.datetime:
    if value.tzinfo is None:
        return value.replace(tzinfo=datetime.UTC)
    try:
        return value.astimezone(datetime.UTC)
    except OverflowError:
        raise ValueError("in UTC it lies outside the years 1 to 9999") from None


def _not_ahead(value: datetime.datetime) -> datetime.datetime:
    if value - now() > MAX_AHEAD:
        raise ValueError("is more than five minutes ahead of the sidecar's clock")
    return value


Timestamp = Annotated[
    datetime.datetime,
    # Not strict: a `date` object is valid too.
    Strict(False),
    BeforeValidator(_read),
    AfterValidator(_as_utc),
    AfterValidator(_not_ahead),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": ISO_8601,
            "description": "ISO 8601, extended or basic format, in UTC unless it has an offset; at "
            "most five minutes ahead of the sidecar's clock",
            "examples": ["2026-01-31T10:00:00Z", "20260131T100000Z"],
        }
    ),
]
"""An aware time in UTC. Text must be ISO 8601; a time without an offset counts as UTC."""
