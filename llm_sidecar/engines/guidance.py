"""Guided decoding: JSON schemas as token masks and forced tokens, by llguidance.

Clients send schemas too. So their size is bounded, and the time to compile and follow them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Collection, Iterator
from typing import Any, Final

import llguidance
import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.schema_size import check_size
from llm_sidecar.errors import InvalidRequest

_KEPT: Final = 16
"""Number of cached grammars, each at most 14 MB: one for proposals, the others for the latest
requests. Fewer requests than that are checked between the check of a request and its start."""
LIMITS: Final = llguidance.LLParserLimits(max_lexer_states=50_000)
"""Limits of the matcher of one row; a state takes up to 2 kB."""
_SECONDS: Final = 10.0
"""CPU time for the matcher of one completion; 4,096 tokens of an ordinary schema take 1 s."""
_REFUSALS: Final = (
    ("Unknown format", "this format is not supported"),
    ("oneOf constraints", "oneOf is not supported if its options may overlap; use anyOf"),
    ("look-around", "a pattern with look-around is not supported"),
    ("backreferences", "a pattern with back-references is not supported"),
    ("patternProperty", "patternProperties that may overlap are not supported"),
    ("regex parse error", "its pattern is not a regular expression"),
    ("circular references", "a $ref to itself beside other keywords is not supported"),
    ("does not exist", "its $ref has no target"),
    ("is not present in a registry", "a $ref to another document is not supported"),
    ("multiple", "this multipleOf is not supported"),
    ("Failed to generate regex for", "its minimum or maximum is too large"),
    ("Unsatisfiable", "no value satisfies it"),
    ("NoExtension", "no value satisfies it"),
    ("recursion limit", "it is nested too deeply"),
)
"""Parts of llguidance's messages, and our messages for them."""
_COMPLEX: Final = re.compile("too (large|big|many)|fuel|Unable to determine|Current row")
_KEYWORDS: Final = re.compile(r"Unimplemented keys: \[(.*?)\]")
_KEYWORD: Final = re.compile(r'"(\$?[A-Za-z]{1,32})"')


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

    def check(self, schema: str) -> None:
        """Compiles a schema, so that `matcher` does not have to.

        It may be called in another thread.

        Raises:
            InvalidRequest: the schema cannot be followed; names keywords that are not supported.
        """
        self._compiled(schema)

    def matcher(self, schema: str) -> Matcher:
        """Creates a matcher for one completion.

        Raises:
            InvalidRequest: as in `check`.
        """
        return Matcher(self._compiled(schema).deep_copy())

    @functools.cached_property
    def _vocabulary(self) -> Any:
        # Without any it takes one of the tokenizer.
        return llguidance.LLTokenizer(self._tokenizer.to_str(), eos_token=self._ends or None)

    def _compile(self, schema: str) -> Any:
        return compile_schema(schema, self._vocabulary)


def compile_schema(schema: str, vocabulary: Any) -> Any:
    """A new matcher of llguidance; `check_size` bounds the time that it takes.

    Args:
        schema: JSON schema text.
        vocabulary: an `LLTokenizer`.

    Raises:
        InvalidRequest: the schema cannot be followed; names keywords that are not supported.
    """
    check_size(schema)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher = llguidance.LLMatcher(vocabulary, grammar, limits=LIMITS, log_level=0)
    # Some limits show at the first token, or after the brace that begins an object.
    first = matcher.deep_copy()
    if not first.is_error():
        first.compute_bitmask()
        first.consume_tokens(vocabulary.tokenize_bytes(first.compute_ff_bytes()))
    if not first.is_stopped():
        first.compute_bitmask()
    if first.is_error():
        raise InvalidRequest(_refusal(first.get_error()), field="schema")
    return matcher


class Matcher:
    """Follows one completion.

    Each method raises InvalidRequest if the schema takes too long to follow. A step may take half a
    second, and blocks all other requests.
    """

    def __init__(self, matcher: Any) -> None:
        """Args: matcher: of llguidance."""
        self._matcher = matcher
        self._seconds = 0.0

    @property
    def is_stopped(self) -> bool:
        """Whether only the end of the turn may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> npt.NDArray[np.intp]:
        """The tokens that may come next, ascending.

        Args:
            vocabulary: the number of the model's tokens.
        """
        with self._limited():
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(mask, bitorder="little", count=vocabulary))

    def consume(self, token: int) -> None:
        """Advances by a token."""
        with self._limited():
            self._matcher.consume_token(token)

    def consume_forced(self, limit: int) -> list[int]:
        """Advances by the forced tokens, at most `limit`, and returns them."""
        with self._limited():
            tokens: list[int] = self._matcher.compute_ff_tokens()[:limit]
            self._matcher.consume_tokens(tokens)
        return tokens

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._seconds += time.thread_time() - began
        if self._matcher.is_error() or self._seconds > _SECONDS:
            raise InvalidRequest(
                "the answer cannot follow it to its end; simplify it", field="schema"
            )


def _refusal(message: str) -> str:
    """Why llguidance refuses a schema; quotes only keywords of the schema."""
    if keywords := _KEYWORDS.search(message):
        return f"{', '.join(_KEYWORD.findall(keywords[1]))} is not supported; leave it out"
    for part, meaning in _REFUSALS:
        if part in message:
            return meaning
    return "it is too complex" if _COMPLEX.search(message) else "it is not a valid JSON schema"
