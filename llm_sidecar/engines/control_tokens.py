"""A model's control tokens (`<|end|>`, `<|im_start|>`), which no message may write.

With a control token, a message could end its turn and continue as the system. `tokenizers` can
treat special tokens as plain text, but only all of them, including those of the chat template. So a
token that a text spells is escaped, and the result's control tokens are compared with the expected
ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Final

_UNKNOWN: Final = "\U000f0000"
"""A character for private use, which no vocabulary has."""
_BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
"""The spelling of a byte of an unknown character in some vocabularies."""


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, template_text: str, written: Collection[int]) -> None:
        """Finds the control tokens.

        They are the special tokens, and the added tokens that the template writes, as in
        transformers (`sanitize_control_tokens` of `apply_chat_template`). The token for unknown
        characters is not one, because plain text may contain such characters.

        Args:
            tokenizer: of the `tokenizers` package.
            template_text: the literal texts of the chat template.
            written: tokens that the template wrote; it may build some from several literals.
        """
        self._tokenizer = tokenizer
        unknown = _tokens_of(_UNKNOWN, tokenizer)
        self._numbers = {
            number
            for number, token in tokenizer.get_added_tokens_decoder().items()
            # A line break is not a control token, and a single character cannot be split.
            if len(token.content.strip()) > 1
            and number not in unknown
            and _BYTE.fullmatch(token.content) is None
            and (token.special or token.content in template_text or number in written)
        }

    def filter(self, tokens: Sequence[int]) -> list[int]:
        """The control tokens among `tokens`, in their order."""
        return [token for token in tokens if token in self._numbers]

    def from_last(self, text: str) -> str:
        """The text from its last control token on; empty if it has none."""
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        starts = [
            start
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._numbers
        ]
        return text[starts[-1] :] if starts else ""

    def escape(self, text: str) -> str:
        """Inserts a space into each control token that the text spells.

        The result may spell another control token, which began inside the escaped one.
        """
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        pieces, done = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._numbers:
                # The offsets of some tokens include the spaces around them.
                first = end - len(text[start:end].lstrip()) + 1
                pieces += [text[done:first], " "]
                done = first
        return "".join([*pieces, text[done:]])


def _tokens_of(character: str, tokenizer: Any) -> set[int]:
    try:
        return {token.id for token in tokenizer.model.tokenize(character)}
    except Exception:  # noqa: BLE001 - some raise if they have no token for it
        return set()
