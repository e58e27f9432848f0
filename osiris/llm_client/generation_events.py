"""The events of a generation, and their parser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import httpx

from osiris.llm_client.errors import LLMClientError
from osiris.llm_client.server_sent_events import Event, EventParser, Lines


class Token(NamedTuple):
    """New text of a model.

    Attributes:
        text: to append to the model's text so far.
        model: `phi3` or `hermes`.
        restart: whether the model begins again: discard its earlier text.
    """

    text: str
    model: str
    restart: bool = False


class Proposal(NamedTuple):
    """Phi-3's proposal, complete and valid."""

    proposal: dict[str, Any]


class Assessment(NamedTuple):
    """Hermes' critique of the proposal, and its score from 0 to 1."""

    text: str
    score: float


class Done(NamedTuple):
    """The end of a generation.

    Attributes:
        answer: what the method without a stream returns.
        headers: the headers of its answer, such as `X-Finish-Reason`.
    """

    answer: dict[str, Any]
    headers: Mapping[str, str]


GenerationEvent = Token | Proposal | Assessment | Done
_KNOWN: Final = frozenset({"token", "proposal", "assessment", "headers", "error", "done"})


class GenerationFailed(Exception):
    """An `error` event.

    Attributes:
        answer: the same error as the answer without a stream.
    """

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__()
        self.answer = answer


class GenerationParser:
    """Parses the stream of one response.

    Attributes:
        done: whether the last event has arrived.
    """

    def __init__(self, response: httpx.Response) -> None:
        """Reads nothing yet.

        Raises:
            LLMClientError: the response is not a stream of events.
        """
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise LLMClientError("the answer is not a stream of events")
        self.done = False
        self._lines, self._events = Lines(), EventParser()
        self._headers: dict[str, str] = {}

    def feed(self, chunk: bytes) -> Iterator[GenerationEvent]:
        """The events that these bytes complete. Unknown events are ignored.

        Raises:
            GenerationFailed: the generation has failed.
            LLMClientError: an event cannot be parsed.
        """
        for line in self._lines.feed(chunk):
            event = self._events.feed(line)
            if event is not None and (parsed := self._parse(event)) is not None:
                yield parsed

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context for reading the whole stream: raises `httpx.RequestError` only if the last
        event is missing."""
        try:
            yield
        except httpx.RequestError:
            if not self.done:
                raise
        if not self.done:
            raise httpx.RemoteProtocolError("the stream ended before its last event")

    def _parse(self, event: Event) -> GenerationEvent | None:
        if event.type not in _KNOWN:
            return None
        try:
            return self._read(event.type, json.loads(event.data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LLMClientError("an event of the stream cannot be parsed") from error

    def _read(self, kind: str, data: Any) -> GenerationEvent | None:
        match kind:
            case "token":
                return Token(data["text"], data["model"], data.get("restart", False))
            case "proposal":
                return Proposal(data)
            case "assessment":
                return Assessment(data["text"], data["score"])
            case "headers":
                self._headers = data
            case "done":
                self.done = True
                return Done(data, self._headers)
            case "error":
                raise GenerationFailed(_as_answer(data))
        return None


def _as_answer(data: Any) -> httpx.Response:
    if data["status"] not in range(400, 600):
        raise ValueError("this is not the status of an error")
    headers = {"Retry-After": str(data["retry_after"])} if "retry_after" in data else {}
    return httpx.Response(data["status"], json=data, headers=headers)
