"""The guidance of a generation as a grammar of llama.cpp (GBNF).

    grammar = to_gbnf(proposals.GUIDANCE)

llama.cpp reads JSON schemas too, but it allows free whitespace and any number of digits, and it
ignores a pattern beside a length. So a proposal could be endless. This grammar allows exactly what
llguidance allows for the same schema: no whitespace, and as many characters as the schema says.

The grammar's language: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Final

from llm_sidecar.engines.bounded_schema import Pattern, read_object
from llm_sidecar.engines.regular import Automaton, Work, compile_pattern

_KEPT: Final = 8
_GRAMMAR: Final = frozenset('"\\[]^-')
"""Characters that mean something in a literal or in a class of the grammar."""


@functools.lru_cache(_KEPT)
def to_gbnf(schema: str) -> str:
    """A grammar that matches the compact JSON of a schema, with the properties in their order.

    Args:
        schema: JSON schema text of an object of strings, numbers, enums and nulls.

    Raises:
        ValueError: the schema has an unsupported keyword or type.
    """
    rules: dict[str, str] = {}
    work, root = Work(), [_literal("{")]
    for number, field in enumerate(read_object(schema)):
        rule = f"v{number}"
        options = [
            _value(value, f"{rule}-{option}", rules, work)
            for option, value in enumerate(field.values)
        ]
        rules[rule] = " | ".join(options)
        part = f"{_literal(field.key)} {rule}"
        root.append(part if field.required else f"({part})?")
    rules = {"root": " ".join([*root, _literal("}")]), **rules}
    return "".join(f"{name} ::= {body}\n" for name, body in rules.items())


def _value(value: str | Pattern, rule: str, rules: dict[str, str], work: Work) -> str:
    """An alternative for a value; adds the rules that it needs."""
    if isinstance(value, str):
        return _literal(value)
    automaton = compile_pattern(value.expression, value.least, value.most, work)
    states = _states(automaton, rule, rules)
    return f"{_literal(value.quote)} {states} {_literal(value.quote)}" if value.quote else states


def _states(automaton: Automaton, rule: str, rules: dict[str, str]) -> str:
    """Adds a rule for each state of an automaton; returns the reference to the first one."""
    for number, moves in enumerate(automaton.moves):
        options = [] if number not in automaton.accepting else ['""']
        for chars, after in _by_state(moves):
            # Nothing follows a state without moves.
            rest = f" {rule}-s{after}" if automaton.moves[after] else ""
            options.append(f"{_class(chars)}{rest}")
        if moves or number == 0:
            rules[f"{rule}-s{number}"] = " | ".join(options)
    return f"{rule}-s0"


def _by_state(moves: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
    """The characters that lead to each state."""
    by_state = sorted(moves.items(), key=lambda move: (move[1], move[0]))
    for after, group in itertools.groupby(by_state, key=lambda move: move[1]):
        yield [char for char, _ in group], after


def _class(chars: list[str]) -> str:
    """A character class, as ranges."""
    ranges: list[list[str]] = []
    for char in chars:
        if ranges and ord(char) == ord(ranges[-1][-1]) + 1:
            ranges[-1] = [ranges[-1][0], char]
        else:
            ranges.append([char])
    return f"[{''.join('-'.join(map(_escape, ends)) for ends in ranges)}]"


def _literal(text: str) -> str:
    return f'"{"".join(map(_escape, text))}"'


def _escape(char: str) -> str:
    if char.isascii() and char.isprintable() and char not in _GRAMMAR:
        return char
    return f"\\U{ord(char):08X}"
