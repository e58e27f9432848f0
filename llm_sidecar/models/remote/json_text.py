"""The first JSON object in streamed text, for a model without guidance."""

from __future__ import annotations


class FirstObject:
    """Keeps the first `{...}` of a text, and drops the rest, such as a Markdown fence.

    Attributes:
        is_whole: whether the object has ended.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> str:
        """The part of new text that belongs to the object."""
        return "".join(char for char in text if self._takes(char))

    def _takes(self, char: str) -> bool:
        if self.is_whole or (not self._depth and char != "{"):
            return False
        if self._in_string:
            self._in_string = char != '"' or self._escaped
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char == "{":
            self._depth += 1
        elif char == "}":
            self._depth -= 1
            self.is_whole = not self._depth
        return True
