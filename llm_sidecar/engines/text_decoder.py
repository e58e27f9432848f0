"""A completion as text, decoded token by token."""

from __future__ import annotations

from typing import Any, Final

from tokenizers.decoders import DecodeStream

_LONGEST_CHARACTER: Final = 8
"""More tokens than any character takes: a character has at most four bytes in UTF-8."""


class TextDecoder:
    """Decodes a completion token by token."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: of the `tokenizers` package."""
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def __call__(self, token: int) -> str:
        try:
            text: str = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the package raises bare ones
            # A byte-level decoder fails on invalid UTF-8, and cannot continue.
            self._begin()
            return "\N{REPLACEMENT CHARACTER}"
        self._pending.append(token)
        if not text and len(self._pending) == _LONGEST_CHARACTER:
            # After invalid UTF-8, the stream would decode the whole text again at every step.
            text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._begin()
        elif text:
            self._pending.clear()
        return text
