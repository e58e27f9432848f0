"""The tokenizer of a GGUF model, with the interface of the `tokenizers` package.

`ChatTokenizer` uses it, so that a GGUF model has the same guarantees as the others: no message can
write a control token. llama.cpp does the work: it is the reference for these files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_sidecar.engines.gguf_model import Token


@dataclass(frozen=True, slots=True)
class Encoding:
    """An encoded text.

    Attributes:
        ids: its tokens.
        offsets: where each of them begins and ends; empty if not asked for.
    """

    ids: list[int]
    offsets: Sequence[tuple[int, int]] = ()


class GgufTokenizer:
    """See the module's docstring."""

    model = None

    def __init__(
        self,
        tokens: Mapping[int, Token],
        vocabulary: int,
        tokenize: Callable[[str, bool], list[int]],
    ) -> None:
        """Creates the tokenizer of a model.

        Args:
            tokens: the control tokens and the added ones, by number.
            vocabulary: number of tokens.
            tokenize: returns the tokens of a text, control tokens included; with True also those
                that begin every text.
        """
        self._tokens = tokens
        self._vocabulary = vocabulary
        self._tokenize = tokenize
        # The longest first, as llama.cpp finds them.
        texts = sorted((token.content for token in tokens.values()), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._numbers = {token.content: number for number, token in tokens.items()}

    def no_truncation(self) -> None:
        """Does nothing: texts are never truncated."""

    def no_padding(self) -> None:
        """Does nothing: texts are never padded."""

    def get_added_tokens_decoder(self) -> Mapping[int, Token]:
        """The added tokens, by number."""
        return self._tokens

    def get_vocab(self) -> Mapping[str, int]:
        """All tokens, each by its number instead of its text."""
        return {str(number): number for number in range(self._vocabulary)}

    def encode_batch_fast(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[Encoding]:
        """The tokens of texts.

        Args:
            add_special_tokens: whether to add the tokens that begin every text.

        Raises:
            TypeError: a text holds half of a surrogate pair, as in `tokenizers`.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TypeError(str(error)) from None
        return [Encoding(self._tokenize(text, add_special_tokens)) for text in texts]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[Encoding]:
        """The control tokens that texts spell, and where; without the tokens between them."""
        return [
            Encoding(
                [self._numbers[match[0]] for match in matches],
                [match.span() for match in matches],
            )
            for matches in (list(self._spelled.finditer(text)) for text in texts)
        ]
