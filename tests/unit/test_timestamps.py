"""Parsing of timestamps and of times on a command line, and the refused ones."""

from __future__ import annotations

import datetime

import pytest
from pydantic import TypeAdapter, ValidationError

from llm_sidecar import timestamps
from llm_sidecar.timestamps import Timestamp

READ: TypeAdapter[datetime.datetime] = TypeAdapter(Timestamp)
TEN = datetime.datetime(2026, 1, 31, 10, tzinfo=datetime.UTC)


def said_of(written: object) -> str:
    """The one error of what is refused."""
    with pytest.raises(ValidationError) as caught:
        READ.validate_python(written)
    (error,) = caught.value.errors()
    return error["msg"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2026-01-31T10:00:00Z", TEN),
        ("2026-01-31T10:00:00z", TEN),
        ("2026-01-31t10:00:00", TEN),
        ("2026-01-31 10:00", TEN),
        ("2026-01-31T10", TEN),
        ("2026-01-31T12:00:00+02:00", TEN),
        ("2026-01-31T12:00:00+0200", TEN),
        ("2026-01-31T05-05", TEN),
        ("2026-01-31T10:00:00.250Z", TEN.replace(microsecond=250_000)),
        ("2026-01-31T10:00:00,123456789Z", TEN.replace(microsecond=123_456)),
        ("2026-01-31", TEN.replace(hour=0)),
        ("20260131T100000Z", TEN),
        ("20260131T100000", TEN),
        ("20260131T1000Z", TEN),
        ("20260131T10", TEN),
        ("20260131T120000+0200", TEN),
        ("20260131T100000.5Z", TEN.replace(microsecond=500_000)),
        (TEN.replace(tzinfo=None), TEN),
        (TEN.astimezone(datetime.timezone(datetime.timedelta(hours=-7))), TEN),
        (datetime.date(2026, 1, 31), TEN.replace(hour=0)),
    ],
)
@pytest.mark.usefixtures("in_tokyo")
def test_iso_8601_is_read_as_utc(written: object, expected: datetime.datetime) -> None:
    read = READ.validate_python(written)
    assert (read, read.utcoffset()) == (expected, datetime.timedelta())


@pytest.mark.parametrize(
    "written",
    [
        "20260131", "2026", "1769817600", "1769817600000", "1769817600.5", "-5", "+0", "0", " 2026",
        "2026-01", "2026-W05-6", "2026W056", "2026-031", "26-01-31", "2026-1-31",
        "2026-02-30", "2026-13-01", "2026-01-31T25:00", "2026-01-31T10:00:60Z", "20260231T10",
        "2026-01-31T10:00:00 Z", "2026-01-31_10:00", "2026-01-31T", "2026-01-31\n", "noon", "",
        "\uff12\uff10\uff12\uff16-01-31", "now", "2026-01-31T10:00:00.Z", "2026-01-31T100000Z",
        "20260131T10:00:00Z",
        "2026-01-31T10:00:00+2", "2026-01-31T10:00:00Europe/Berlin",
        1769817600, 1769817600.0, 0, True, b"2026-01-31", ["2026-01-31"],
    ],
)  # fmt: skip
def test_what_is_no_full_iso_8601_date_is_refused(written: object) -> None:
    assert said_of(written) == (
        "Value error, must be ISO 8601 with a full date, such as 2026-01-31T10:00:00Z or "
        "20260131T100000Z"
    )


@pytest.mark.parametrize("written", ["0001-01-01T00:00+05:00", "9999-12-31T23:59-05:00"])
def test_a_time_that_utc_does_not_have_is_refused(written: str) -> None:
    assert said_of(written) == "Value error, in UTC it lies outside the years 1 to 9999"


def test_a_clock_may_be_five_minutes_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timestamps, "now", lambda: TEN)
    near = TEN + datetime.timedelta(minutes=5)
    assert READ.validate_python(near.isoformat()) == near
    assert said_of(near + datetime.timedelta(microseconds=1)) == (
        "Value error, is more than five minutes ahead of the sidecar's clock"
    )


# On a command line


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        ("90m", TEN.replace(hour=8, minute=30)),
        ("1.5h", TEN.replace(hour=8, minute=30)),
        ("30d", TEN.replace(day=1)),
        ("4w", TEN.replace(day=3)),
        ("0d", TEN),
    ],
)
def test_an_age_counts_back_from_now(
    monkeypatch: pytest.MonkeyPatch, age: str, expected: datetime.datetime
) -> None:
    monkeypatch.setattr(timestamps, "now", lambda: TEN)
    assert timestamps.since(age) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31", TEN.replace(hour=0)),
        ("2026-01-31T10:00:00", TEN),
        ("2026-01-31T10:00Z", TEN),
        ("2026-01-31T12:00+02:00", TEN),
    ],
)
@pytest.mark.usefixtures("in_tokyo")
def test_a_time_on_a_command_line_is_in_utc(text: str, expected: datetime.datetime) -> None:
    found = timestamps.since(text)
    assert (found, found.utcoffset()) == (expected, datetime.timedelta())


@pytest.mark.parametrize(
    "text", ["", "d", "7", "7x", "xd", "infd", "999999999d", "noon", "0001-01-01T00:00+05:00"]
)
def test_a_command_line_without_a_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        timestamps.since(text)
    assert str(caught.value) == f"{text!r} is not a time such as 2026-01-31 or 7d."
