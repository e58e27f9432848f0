"""Where tokens begin in the text that they form."""

from __future__ import annotations

import codecs
from typing import Final

_NEAR: Final = 8
"""Characters of a text that may belong to no token, where the text and its tokens differ."""


class TextOffsets:
    """Finds the tokens of a text one after the other; counts in characters.

    A token may spell what the text lacks: a control token, such as the one that begins every prompt
    (BOS), or the space that SentencePiece puts before a text. That takes no characters.
    """

    def __init__(self) -> None:
        """Begins before the first token."""
        self._text = ""
        self._start = self._next = 0
        # Tokens may split a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, text: str) -> None:
        """Adds text, before its tokens are looked up."""
        done = self._next - self._start
        self._start += min(done, len(self._text))
        self._text = self._text[done:] + text

    def skip(self) -> None:
        """The next token begins at the end of the text so far."""
        self._next = self._start + len(self._text)

    def of(self, data: bytes) -> int:
        """Where the next token begins.

        Args:
            data: the bytes of the token.
        """
        spelled = self._decoder.decode(data)
        begin = end = self._next - self._start
        known = self._text[begin : begin + len(spelled)]
        if known and spelled.startswith(known):
            # The text may end within the token.
            end = begin + len(spelled)
        elif spelled[:1] == " " and self._text.startswith(spelled[1:], begin):
            end = begin + len(spelled) - 1
            if self._text[begin - 1 : begin] == " ":
                # The space of the token before is the one that the text lacks.
                begin -= 1
        elif (at := self._text.find(spelled, begin, begin + len(spelled) + _NEAR)) >= 0:
            begin, end = at, at + len(spelled)
        self._next = self._start + end
        return self._start + begin
