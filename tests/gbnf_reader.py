"""Reads the grammars that `llm_sidecar.engines.gbnf` writes: matches and samples texts.

It knows the part of llama.cpp's language that they use: literals, classes, rules, groups that may
be left out, and alternatives.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\)\?|[(|]|[a-z0-9-]+')
_ESCAPE: Final = re.compile(r"\\U([0-9A-F]{8})")


class Chars(NamedTuple):
    """One character of a class."""

    chars: frozenset[str]


class Rule(NamedTuple):
    """The text of a rule."""

    name: str


Sequence = tuple["Chars | Rule", ...]


class Grammar:
    """A grammar; `rules` holds the alternatives of each rule."""

    def __init__(self, text: str) -> None:
        self.rules: dict[str, list[Sequence]] = {}
        for line in text.splitlines():
            name, body = line.split(" ::= ", 1)
            tokens = _TOKEN.findall(body)
            self.rules[name] = self._alternatives(name, tokens)

    def _alternatives(self, name: str, tokens: list[str]) -> list[Sequence]:
        found: list[list[Chars | Rule]] = [[]]
        while tokens:
            token = tokens.pop(0)
            if token == "|":
                found.append([])
            elif token == "(":
                group = f"{name}/{len(self.rules)}"
                end = tokens.index(")?")
                self.rules[group] = [*self._alternatives(group, tokens[:end]), ()]
                del tokens[: end + 1]
                found[-1].append(Rule(group))
            elif token[0] == '"':
                found[-1] += [Chars(frozenset(char)) for char in _text(token)]
            elif token[0] == "[":
                found[-1].append(Chars(_class(token)))
            else:
                found[-1].append(Rule(token))
        return [tuple(one) for one in found]

    def matches(self, text: str) -> bool:
        """Whether the grammar allows exactly this text."""
        stacks: list[Sequence] = [(Rule("root"),)]
        for char in text:
            stacks = [
                stack[1:]
                for stack in self._expanded(stacks)
                if stack and isinstance(stack[0], Chars) and char in stack[0].chars
            ]
        return () in self._expanded(stacks)

    def sample(self, chance: random.Random) -> str:
        """A random text of the grammar."""
        text, stack = "", self.rules["root"][0]
        while True:
            chosen = chance.choice(self._expanded([stack]))
            if not chosen:
                return text
            assert isinstance(chosen[0], Chars)
            text += chance.choice(sorted(chosen[0].chars))
            stack = chosen[1:]

    def _expanded(self, stacks: list[Sequence]) -> list[Sequence]:
        """The stacks with a character or nothing on top."""
        found, waiting = [], list(stacks)
        while waiting:
            stack = waiting.pop()
            if stack and isinstance(stack[0], Rule):
                waiting += [(*body, *stack[1:]) for body in self.rules[stack[0].name]]
            else:
                found.append(stack)
        return found


def _text(token: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), token[1:-1])


def _class(token: str) -> frozenset[str]:
    chars: set[str] = set()
    body = re.findall(r"\\U[0-9A-F]{8}|.", token[1:-1])
    read = [_text(f'"{char}"') for char in body]
    at = 0
    while at < len(read):
        # An escaped hyphen is not a range.
        if at + 2 < len(read) and body[at + 1] == "-":
            chars.update(map(chr, range(ord(read[at]), ord(read[at + 2]) + 1)))
            at += 3
        else:
            chars.add(read[at])
            at += 1
    return frozenset(chars)
