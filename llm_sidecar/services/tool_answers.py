"""Reads an answer that is a tool call or text, while its JSON is generated; see `tools`."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Final

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.json_text import JsonValue
from llm_sidecar.models.base import TokenLogprob
from llm_sidecar.services.answers import Part, TextAnswer, ToolCallPart
from llm_sidecar.text import cleaned

_TEXT: Final = re.compile(r'\s*\{\s*"text"\s*:\s*"')
_ANSWER: Final = re.compile(r'\s*\{\s*"answer"\s*:\s*(?=\S)')
_CALL: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]+)"\s*,\s*"arguments"\s*:\s*(?=\S)')
_CHARACTERS: Final = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
"""Whole characters of a JSON string."""
_HALF: Final = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
"""The first half of a surrogate pair, whose second half is still to come."""


class ToolAnswer:
    """The parts of an answer under `tools.answer_schema`.

    Attributes:
        has_call: whether it is a call.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        """Args: stop: stop texts of an answer that is text."""
        self.has_call = False
        self._text = TextAnswer(stop)
        self._json = ""
        self._read: _JsonString | JsonValue | None = None
        self._name = ""
        self._call_id = f"call_{uuid.uuid4().hex}"

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found; the answer ends before it."""
        return self._text.stopped

    def feed(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> Iterator[Part]:
        """The parts that new text completes.

        Args:
            text: generated since the call before.
            logprobs: are left out, because they are those of the JSON.
        """
        self._json += text
        if self._read is None:
            self._begin()
            if self.has_call:
                yield self._call_part("")
        if self._read is not None:
            text, self._json = self._read.take(self._json), ""
            if text:
                yield from self._parts(text)

    def finish(self, *, is_whole: bool) -> Iterator[Part]:
        """The rest, once the model has ended.

        Args:
            is_whole: whether the model has ended the answer by itself.

        Raises:
            ModelUnavailable: the complete answer violates its schema.
        """
        if self._read is None and is_whole:
            yield from self._other_order()
        elif is_whole and not self._read_all():
            raise _broken()
        if not self.has_call:
            yield from self._text.finish()

    def _begin(self) -> None:
        """Decides from its beginning whether the answer is a call or text."""
        if found := _TEXT.match(self._json):
            self._read = _JsonString()
        elif found := _CALL.match(self._json):
            self._read, self.has_call, self._name = JsonValue(), True, found[1]
        elif found := _ANSWER.match(self._json):
            self._read = JsonValue()
        if found:
            self._json = self._json[found.end() :]

    def _read_all(self) -> bool:
        return self._read is not None and self._read.ended

    def _parts(self, text: str) -> Iterator[Part]:
        if self.has_call:
            yield self._call_part(text)
        else:
            yield from self._text.feed(text)

    def _call_part(self, arguments: str) -> ToolCallPart:
        return ToolCallPart(0, self._call_id, self._name, arguments)

    def _other_order(self) -> Iterator[Part]:
        """The parts of an answer whose keys come in another order, which the guidance of a remote
        server may allow."""
        try:
            whole = json.loads(self._json)
        except ValueError:
            raise _broken() from None
        match whole:
            case {"name": str(name), "arguments": dict(arguments)}:
                self.has_call, self._name = True, name
                yield self._call_part(_dumps(arguments))
            case _:
                raise _broken()


class _JsonString:
    """Decodes a JSON string whose opening quote has been read.

    Attributes:
        ended: whether its closing quote has been read.
    """

    def __init__(self) -> None:
        self.ended = False
        self._source = ""

    def take(self, source: str) -> str:
        """The text that new source completes."""
        if self.ended:
            return ""
        self._source += source
        found = _CHARACTERS.match(self._source)
        assert found is not None
        end = found.end()
        self.ended = self._source[end : end + 1] == '"'
        if not self.ended and (half := _HALF.search(self._source[:end])):
            end = half.start()
        # Not strict: accept raw control characters.
        text: str = json.loads(f'"{self._source[:end]}"', strict=False)
        self._source = self._source[end:]
        return cleaned(text)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _broken() -> ModelUnavailable:
    return ModelUnavailable(
        "The model did not write a valid answer or call, so nothing more is returned; try again.",
        retry_after=1,
    )
