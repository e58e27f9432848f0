"""A model's control tokens (`<|end|>`, `<|im_start|>`), which no message may write.

With one a message could end its turn and speak as the system. `tokenizers` can leave such tokens in
a text unread, but only all that are declared special, those of the chat template with them. So a
text that spells one is changed, and what comes out is counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Final

_UNKNOWN: Final = "\U000f0000"
"""A character for private use, which no vocabulary has."""
_BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
"""What some models make of each byte of an unknown character."""


class ControlTokens:
    """Those of one tokenizer."""

    def __init__(self, tokenizer: Any, template_text: str, written: Collection[int]) -> None:
        """Finds them.

        They are the special tokens, and of the other added ones those that the template writes, as
        transformers has it (`sanitize_control_tokens` of `apply_chat_template`); but not those that
        stand for unknown characters, which plain text may become.

        Args:
            tokenizer: of the `tokenizers` package.
            template_text: the texts that the chat template may write.
            written: tokens that it has written; some it puts together of pieces.
        """
        self._tokenizer = tokenizer
        unknown = _tokens_of(_UNKNOWN, tokenizer)
        self._numbers = {
            number
            for number, token in tokenizer.get_added_tokens_decoder().items()
            # A line break is no control token, and a single character cannot be broken.
            if len(token.content.strip()) > 1
            and number not in unknown
            and _BYTE.fullmatch(token.content) is None
            and (token.special or token.content in template_text or number in written)
        }

    def among(self, tokens: Sequence[int]) -> list[int]:
        """Those that are among `tokens`, in their order."""
        return [token for token in tokens if token in self._numbers]

    def broken(self, text: str) -> str:
        """The text with a space inside each one that it spells.

        What is left may spell another one, which began inside of it.
        """
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        pieces, done = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._numbers:
                # Some take the spaces around them along.
                first = end - len(text[start:end].lstrip()) + 1
                pieces += [text[done:first], " "]
                done = first
        return "".join([*pieces, text[done:]])


def _tokens_of(character: str, tokenizer: Any) -> set[int]:
    try:
        return {token.id for token in tokenizer.model.tokenize(character)}
    except Exception:  # noqa: BLE001 - some raise where they have no token for it
        return set()
