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
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llm_sidecar.engines.regular import Automaton, Work, compile_pattern

_KEPT: Final = 8
_MOST_NUMBER: Final = 1000
_ESCAPED: Final = frozenset('"\\')
"""Characters that a JSON string cannot hold as they are; control characters are the others."""
_GRAMMAR: Final = _ESCAPED | frozenset("[]^-")
"""Characters that mean something in a literal or in a class of the grammar."""


@functools.lru_cache(_KEPT)
def to_gbnf(schema: str) -> str:
    """A grammar that matches the compact JSON of a schema, with the properties in their order.

    Args:
        schema: JSON schema text of an object of strings, numbers, enums and nulls.

    Raises:
        ValueError: the schema holds something else.
    """
    rules: dict[str, str] = {}
    try:
        root = _object(json.loads(schema), rules, Work())
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # A keyword is missing, or its value has another type.
        raise ValueError(f"the schema is not supported ({type(error).__name__})") from None
    lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in rules.items())]
    return "\n".join(lines) + "\n"


def _object(schema: Any, rules: dict[str, str], work: Work) -> str:
    _check_keys(schema, {"type", "properties", "required", "additionalProperties", "x-guidance"})
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        raise ValueError("only an object without other properties is supported")
    required = set(schema.get("required", ()))
    parts = [_literal("{")]
    for number, (name, value) in enumerate(schema.get("properties", {}).items()):
        if number == 0 and name not in required:
            raise ValueError("the first property must be required")
        comma = "," if number else ""
        rule = f"v{number}"
        rules[rule] = _value(value, rule, rules, work)
        part = f"{_literal(f'{comma}{json.dumps(name)}:')} {rule}"
        parts.append(part if name in required else f"({part})?")
    return " ".join([*parts, _literal("}")])


def _value(schema: Mapping[str, Any], rule: str, rules: dict[str, str], work: Work) -> str:
    """The body of a value's rule; adds the rules that it needs."""
    if "enum" in schema:
        _check_keys(schema, {"enum"})
        return " | ".join(_literal(_dumps(value)) for value in schema["enum"])
    if "anyOf" in schema:
        _check_keys(schema, {"anyOf"})
        options = enumerate(schema["anyOf"])
        return " | ".join(_value(option, f"{rule}-{n}", rules, work) for n, option in options)
    match schema.get("type"):
        case "null":
            _check_keys(schema, {"type"})
            return _literal("null")
        case "number":
            return _states(compile_pattern(_number_pattern(schema), work=work), rule, rules)
        case "string":
            _check_keys(schema, {"type", "pattern", "minLength", "maxLength"})
            pattern = schema.get("pattern", "")
            if not (pattern.startswith("^") and pattern.endswith("$")):
                raise ValueError("a string needs a pattern from ^ to $, which bounds it")
            least, most = schema.get("minLength", 0), schema.get("maxLength")
            automaton = compile_pattern(pattern, least, most, work)
            _check_characters(automaton)
            return f"{_literal(chr(34))} {_states(automaton, rule, rules)} {_literal(chr(34))}"
    raise ValueError("a value has no supported type")


def _number_pattern(schema: Mapping[str, Any]) -> str:
    """Numbers from 0 to an integer, with at most as many decimals as `multipleOf` has."""
    _check_keys(schema, {"type", "minimum", "maximum", "multipleOf"})
    most, step = schema["maximum"], str(schema["multipleOf"])
    decimals = re.fullmatch(r"0\.(0*)1", step)
    if schema["minimum"] != 0 or decimals is None or not 0 < most <= _MOST_NUMBER or most % 1:
        raise ValueError("only numbers from 0 to an integer, with some decimals, are supported")
    places = len(decimals[1]) + 1
    below = "|".join(map(str, range(int(most))))
    return rf"({below})(\.[0-9]{{1,{places}}})?|{int(most)}(\.0{{1,{places}}})?"


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


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_characters(automaton: Automaton) -> None:
    """Raises ValueError if a string needs escapes in JSON."""
    for char in itertools.chain.from_iterable(automaton.moves):
        if char in _ESCAPED or not char.isprintable():
            raise ValueError("a pattern holds a character that JSON escapes")


def _check_keys(schema: Mapping[str, Any], known: set[str]) -> None:
    if unknown := schema.keys() - known:
        raise ValueError(f"the schema holds {', '.join(sorted(unknown))}")
