"""The bytes of each token, by the tokenizer's own decoder.

Vocabularies spell bytes as printable characters in one of two ways:

- Byte-level BPE has a character for each byte: `Ġ` is a space (`bytes_to_unicode` of GPT-2; Radford
  et al. 2019, "Language Models are Unsupervised Multitask Learners").
- SentencePiece writes `▁` for a space, and `<0x0A>` for a byte of a character that the vocabulary
  lacks (Kudo and Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import re
from typing import Any, Final

_BYTE: Final = re.compile("<0x([0-9A-F]{2})>")
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"


def _byte_level() -> dict[str, int]:
    """The byte of each character in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL: Final = _byte_level()


class TokenBytes:
    """Returns the bytes of each token of a vocabulary; none for an id without a token.

    A space that the tokenizer puts before a text, and its decoder removes, is part of the token.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: of the `tokenizers` package."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._added: dict[int, bytes] = {number: token.content.encode() for number, token in added}
        steps = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self._is_byte_level = b'"ByteLevel"' in steps
        self._has_byte_tokens = b'"ByteFallback"' in steps
        self._marks_spaces = _SPACE.encode() in steps

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            # An added token is spelled as in the text.
            return self._added[token]
        spelled: str = self._tokenizer.id_to_token(token) or ""
        if self._is_byte_level and all(character in _BYTE_LEVEL for character in spelled):
            return bytes(_BYTE_LEVEL[character] for character in spelled)
        if self._has_byte_tokens and (byte := _BYTE.fullmatch(spelled)):
            return bytes.fromhex(byte[1])
        return (spelled.replace(_SPACE, " ") if self._marks_spaces else spelled).encode()
