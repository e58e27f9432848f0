"""Parses server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation)."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from typing import Final, NamedTuple

from osiris.llm_client.errors import LLMClientError

_LINE_END: Final = re.compile(r"\r\n|\n|\r(?!\n|\Z)")
"""A CR at the very end may be the first half of CR LF."""


class Event(NamedTuple):
    """A server-sent event.

    Attributes:
        id: the id of its entry in the stream, to resume after it; None for a `gap`.
        type: such as `phi3.proposal.created`; or `gap`, which means that events may be missing.
        data: its payload, usually JSON text.
    """

    id: str | None
    type: str
    data: str


class Lines:
    """Splits a stream into lines. `httpx.Response.iter_lines` would split at more characters, such
    as U+2028, which a text in JSON may contain."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The lines that these bytes complete, without their ends."""
        self._started.append(self._decoder.decode(chunk))
        if b"\n" not in chunk and b"\r" not in chunk:
            return []
        *lines, rest = _LINE_END.split("".join(self._started))
        self._started = [rest]
        return lines


class EventParser:
    """Parses lines into events."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}
        self._data: list[str] = []

    def feed(self, line: str) -> Event | None:
        """The event that this line completes, or None."""
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif line:
            self._fields[name] = value.removeprefix(" ")
        if line:
            return None
        fields, data = self._fields, self._data
        self._fields, self._data = {}, []
        if not data:
            return None
        return Event(fields.get("id"), fields.get("event", "message"), "\n".join(data))


class AudioEvents:
    """Parses the lines of the audio stream into WAVs."""

    def __init__(self) -> None:
        self._parser = EventParser()

    def feed(self, line: str) -> bytes | None:
        """The WAV that this line completes, or None."""
        event = self._parser.feed(line)
        # An event of this name says how many WAVs a slow listener lost.
        if event is None or event.type == "lost":
            return None
        try:
            return base64.b64decode(event.data.replace("\n", ""), validate=True) or None
        except binascii.Error as error:
            raise LLMClientError("an event of the audio stream is not valid base64") from error
