"""Finds the end of a JSON value in text that arrives in pieces.

value = JsonValue()
value.take('{"a": [1')  # '{"a": [1'
value.take("]} and more")  # ']}'
value.ended  # True
"""

from __future__ import annotations


class JsonValue:
    """A JSON value of any type; it is not validated.

    Attributes:
        ended: whether it is complete. A number or a keyword ends at the character after it.
    """

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def take(self, text: str) -> str:
        """The part of new text that belongs to the value."""
        for number, char in enumerate(text):
            if self.ended or not self._includes(char):
                self.ended = True
                return text[:number]
        return text

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


class FirstObject:
    """The first object, `{...}`, of a text; drops the rest, such as a Markdown fence."""

    def __init__(self) -> None:
        self._value: JsonValue | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the object has ended."""
        return self._value is not None and self._value.ended

    def feed(self, text: str) -> str:
        """The part of new text that belongs to the object."""
        if self._value is None:
            begin = text.find("{")
            if begin < 0:
                return ""
            self._value, text = JsonValue(), text[begin:]
        return self._value.take(text)
