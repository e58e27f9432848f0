"""A completion as text, decoded token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tokenizers.decoders import DecodeStream

_MOST_BYTES: Final = 4
"""Maximum number of bytes of a character in UTF-8; a token has at least one byte."""
_LONGEST_CHARACTER: Final = 8
"""More tokens than any character takes."""
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of an incomplete character decode to."""


class TextDecoder:
    """Decodes a completion token by token."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begins a completion.

        Args:
            tokenizer: of the `tokenizers` package.
            before: the tokens of the text that the completion continues. Without them, it is a text
                of its own: SentencePiece removes the space before it.
        """
        self._tokenizer = tokenizer
        self._begin(self._last_character(before))

    def _begin(self, before: Sequence[int] = ()) -> None:
        self._stream = DecodeStream(list(before), skip_special_tokens=True)
        self._pending: list[int] = []

    def _last_character(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens of the last character; none if that is incomplete."""
        for count in range(1, _MOST_BYTES + 1):
            last = tokens[-count:]
            if not self._tokenizer.decode(last, skip_special_tokens=True).endswith(_INCOMPLETE):
                return last
        return ()

    def __call__(self, token: int) -> str:
        try:
            text: str = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the package raises bare exceptions
            # A byte-level decoder fails on invalid UTF-8, and cannot continue.
            self._begin()
            return _INCOMPLETE
        self._pending.append(token)
        if not text and len(self._pending) == _LONGEST_CHARACTER:
            # After invalid UTF-8, the stream would decode the whole text again at every step.
            text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._begin()
        elif text:
            self._pending.clear()
        return text
