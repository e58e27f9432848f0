"""Reads an answer that is a tool call or text, while its JSON is generated; see `tools`."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Final

from llm_sidecar.errors import ModelUnavailable
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
        self._read: _String | _Value | None = None
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
            text, self._json = self._read.take(self._json)
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
            self._read = _String()
        elif found := _CALL.match(self._json):
            self._read, self.has_call, self._name = _Value(), True, found[1]
        elif found := _ANSWER.match(self._json):
            self._read = _Value()
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


class _String:
    """Decodes a JSON string whose opening quote has been read.

    Attributes:
        ended: whether its closing quote has been read.
    """

    def __init__(self) -> None:
        self.ended = False

    def take(self, source: str) -> tuple[str, str]:
        """The text that `source` completes, and the rest of the source."""
        if self.ended:
            return "", ""
        found = _CHARACTERS.match(source)
        assert found is not None
        end = found.end()
        self.ended = source[end : end + 1] == '"'
        if not self.ended and (half := _HALF.search(source[:end])):
            end = half.start()
        # Not strict: accept raw control characters.
        text: str = json.loads(f'"{source[:end]}"', strict=False)
        return cleaned(text), source[end:]


class _Value:
    """Finds the end of any JSON value.

    Attributes:
        ended: whether it is whole.
    """

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def take(self, source: str) -> tuple[str, str]:
        """The part of `source` that belongs to the value, and the rest, which does not."""
        for number, char in enumerate(source):
            if self.ended:
                return source[:number], ""
            if not self._includes(char):
                self.ended = True
                return source[:number], ""
        return source, ""

    def _includes(self, char: str) -> bool:
        """Whether the next character belongs to the value; notices its end."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.ended = self._depth == 0
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            # At depth 0, a bracket of the outer value ends a number.
            if self._depth == 0:
                return False
            self._depth -= 1
            self.ended = self._depth == 0
        elif char in ", \n\r\t":
            return self._depth > 0
        return True


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _broken() -> ModelUnavailable:
    return ModelUnavailable(
        "The model did not write a valid answer or call, so nothing more is returned; try again.",
        retry_after=1,
    )
