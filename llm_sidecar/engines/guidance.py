"""Guided decoding: JSON schemas as token masks and forced tokens, by llguidance."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, Final

import llguidance

_KEPT: Final = 8
"""Number of cached grammars: one for proposals, the others for the latest requests with other
guidance."""


class Grammars:
    """Compiled grammars for one tokenizer.

    Compiling takes milliseconds, copying a compiled grammar microseconds.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        """Indexes the vocabulary on first use.

        Args:
            tokenizer: of the `tokenizers` package.
            ends: tokens that end a turn.
        """
        self._tokenizer = tokenizer
        self._ends = sorted(ends)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def matcher(self, schema: str) -> Any:
        """Creates a matcher, which masks the next token at each step.

        Raises:
            ValueError: llguidance refuses the schema.
        """
        return self._compiled(schema).deep_copy()

    @functools.cached_property
    def _vocabulary(self) -> Any:
        # Without any it takes one of the tokenizer.
        return llguidance.LLTokenizer(self._tokenizer.to_str(), eos_token=self._ends or None)

    def _compile(self, schema: str) -> Any:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar)
        if matcher.is_error():
            raise ValueError(f"the guidance schema is refused: {matcher.get_error()}")
        return matcher
