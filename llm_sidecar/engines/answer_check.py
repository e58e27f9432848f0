"""Checks of JSON schemas and of the answers to them, without a tokenizer or a model.

They need only llguidance, which takes 5 MB and 10 ms.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import llguidance

from llm_sidecar.engines.guidance import LIMITS, compile_schema

_KEPT: Final = 32
_MATCHERS: Final = 4
"""Number of cached matchers, each at most 14 MB."""
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_PIECE: Final = 4096
"""Bytes that are checked without a break, in about 10 ms; no other thread runs meanwhile."""
_SECONDS: Final = 10.0
"""CPU time for one answer."""


@functools.lru_cache(_KEPT)
def check_schema(schema: str) -> None:
    """Raises InvalidRequest if the schema cannot be followed, as on the other engines."""
    compile_schema(schema, _byte_vocabulary())


def follows(schema: str, answer: str) -> bool:
    """Whether a finished answer follows its schema, with its properties in any order.

    It takes some milliseconds, and is false for an answer that takes longer than 10 s.

    Args:
        schema: JSON schema text (llguidance dialect) that `check_schema` accepts.
        answer: JSON text; white space and escapes do not matter.
    """
    if _matches(schema, answer):
        return True
    try:
        value = _in_order(json.loads(answer), list(_orders(json.loads(schema))))
        return _matches(schema, json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return False


def _matches(schema: str, answer: str) -> bool:
    try:
        content = list(_STRING.sub(_unescaped, answer).encode())
    except ValueError:
        # The matcher refuses a string.
        return False
    matcher, began = _matcher(schema).deep_copy(), time.thread_time()
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        if matcher.try_consume_tokens(piece) < len(piece):
            return False
        if time.thread_time() - began > _SECONDS:
            return False
        # Lets other threads run.
        time.sleep(0)
    return bool(matcher.is_accepting())


def _unescaped(string: re.Match[str]) -> str:
    """A string without unnecessary escapes, which llguidance does not allow."""
    return json.dumps(json.loads(string[0]), ensure_ascii=False)


def _orders(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The properties of each object in a schema, in the order of llguidance."""
    if isinstance(schema, Mapping):
        if isinstance(properties := schema.get("properties"), Mapping):
            yield properties
        for value in schema.values():
            yield from _orders(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _orders(value)


def _in_order(value: Any, orders: list[Mapping[str, Any]]) -> Any:
    """A value whose objects have the order of those that share the most properties with them."""
    if isinstance(value, list):
        return [_in_order(one, orders) for one in value]
    if not isinstance(value, dict):
        return value
    order = max(orders, key=lambda names: len(value.keys() & names.keys()), default={})
    names = [name for name in order if name in value]
    others = [name for name in value if name not in order]
    return {name: _in_order(value[name], orders) for name in [*names, *others]}


@functools.lru_cache(_MATCHERS)
def _matcher(schema: str) -> Any:
    # Whitespace between values changes nothing.
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_flexible": True}
    )
    return llguidance.LLMatcher(_byte_vocabulary(), grammar, limits=LIMITS, log_level=0)


@functools.cache
def _byte_vocabulary() -> Any:
    """A vocabulary whose first tokens are the bytes."""
    return llguidance.LLTokenizer("byte")
