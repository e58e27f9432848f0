"""The client's parser of server-sent events: lines, events and WAVs."""

from __future__ import annotations

import base64

import pytest

from osiris.llm_client import LLMClientError
from osiris.llm_client.server_sent_events import AudioEvents, Event, EventParser, Lines

# Lines

STREAM = 'id: 1\r\nevent: e\r\ndata: {"a": "x\u2028\u0085\x0by"}\r\n\r\ndata: ü\n\n: end\r\r'
LINES = ["id: 1", "event: e", 'data: {"a": "x\u2028\u0085\x0by"}', "", "data: ü", "", ": end"]


@pytest.mark.parametrize("size", range(1, 12))
def test_a_stream_is_split_at_the_ends_of_lines_only(size: int) -> None:
    data, lines = STREAM.encode(), Lines()
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    # The last CR may be followed by LF.
    assert [line for chunk in chunks for line in lines.feed(chunk)] == LINES
    assert lines.feed(b"\n") == [""]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert Lines().feed(b"data: \xff\n") == ["data: \ufffd"]


# Events


def parsed(*lines: str) -> list[Event]:
    parser = EventParser()
    return [event for line in lines if (event := parser.feed(line)) is not None]


def test_an_event_has_its_id_its_type_and_its_data() -> None:
    found = parsed(": ping", "", "id: 1-0", "event: phi3.proposal.created", 'data: {"n": 1}', "")
    assert found == [Event("1-0", "phi3.proposal.created", '{"n": 1}')]


def test_lines_of_data_are_joined_and_nothing_stays_for_the_next_event() -> None:
    found = parsed("id:1-0", "event:e", "data: a: b", "data:", "data", "", "data:  c", "")
    assert found == [Event("1-0", "e", "a: b\n\n"), Event(None, "message", " c")]


def test_an_event_without_data_is_ignored() -> None:
    assert parsed("id: 1-0", "event: e", "", "", "data: x", "") == [Event(None, "message", "x")]


# The audio stream


def encoded(wav: bytes) -> str:
    return base64.b64encode(wav).decode()


def fed(*lines: str) -> list[bytes]:
    events = AudioEvents()
    return [wav for line in lines if (wav := events.feed(line)) is not None]


def test_an_event_is_a_wav_once_its_line_is_empty() -> None:
    events = AudioEvents()
    assert events.feed(f"data: {encoded(b'RIFF1')}") is None
    assert events.feed("") == b"RIFF1"
    assert events.feed("") is None
    assert events.feed(f"data: {encoded(b'RIFF2')}") is None
    assert events.feed("") == b"RIFF2"


@pytest.mark.parametrize(
    "lines",
    [
        ["data:UklGRg==", ""],
        ["data: UklG", "data: Rg==", ""],
        [": keep-alive", "", "data: UklGRg==", ""],
        ["event: wav", "id: 7", "data: UklGRg==", "retry: 5", ""],
        ["event: lost", "data: 12", "", "data: UklGRg==", ""],
        ["event:lost", "data: 12", "", "data: UklGRg==", ""],
        ["event: lost", "", "data: UklGRg==", ""],
        ["data: 12", "event: lost", "", "data: UklGRg==", ""],
        ["data", "data: UklGRg==", ""],
        ["", "data: UklGRg==", "", ""],
    ],
)
def test_whatever_is_around_it_a_wav_is_found(lines: list[str]) -> None:
    assert fed(*lines) == [b"RIFF"]


def test_a_wav_whose_last_line_has_not_come_is_none_yet() -> None:
    assert fed("data: UklGRg==") == []


@pytest.mark.parametrize("data", ["a", "!!!!", "UklGRg=", "UklG Rg==", "UklG:Rg=="])
def test_an_event_that_is_not_base64_is_an_error(data: str) -> None:
    events = AudioEvents()
    events.feed(f"data: {data}")
    with pytest.raises(LLMClientError, match=r"^an event of the audio stream is not valid base64$"):
        events.feed("")
    # The next one is read all the same.
    events.feed("data: UklGRg==")
    assert events.feed("") == b"RIFF"
