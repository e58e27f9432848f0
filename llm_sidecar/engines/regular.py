"""Regular expressions as finite automata, from which grammars are written.

    automaton = compile_pattern("^[A-Z]{1,3}$", most=2)
    automaton.moves[0]  # {"A": 1, "B": 1, ...}

The expressions are those of the guidance: literals, classes, groups, alternatives, repetitions and
escapes of single characters. They match whole strings.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple

_SPECIAL: Final = frozenset("|)*+?{")
_UNSUPPORTED: Final = frozenset("^$.")
_QUANTIFIERS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_LAST_ANCHOR: Final = re.compile(r"(?<!\\)(?:\\\\)*\$\Z")
"""A dollar sign at the end that is not escaped."""
_MOST_COPIES: Final = 1000
"""The largest number of repetitions; each is a state."""
_MOST_STATES: Final = 100_000
_MOST_WORK: Final = 50_000_000
"""This much work takes about three seconds; the grammar of a proposal takes up to half of it."""
_STEP: Final = 32
"""The work of a step in Python, in elements of a set."""


class Work:
    """Bounds the time and the memory of compiling patterns, in elements of sets."""

    def __init__(self) -> None:
        self._left = _MOST_WORK

    def spend(self, work: int) -> None:
        """Uses up some work; raises ValueError if too little is left."""
        self._left -= work
        if self._left < 0:
            raise ValueError("the patterns take too much work")


@dataclass(slots=True)
class Automaton:
    """A deterministic automaton; state 0 is the first.

    Attributes:
        moves: the next state for each character, by state.
        accepting: the states in which a string may end.
    """

    moves: list[dict[str, int]] = field(default_factory=list)
    accepting: set[int] = field(default_factory=set)


class _Fragment(NamedTuple):
    """An expression as positions, each of which stands for one character of the string.

    See Glushkov 1961, "The abstract theory of automata".

    Attributes:
        empty: whether it matches the empty string.
        first, last: the positions of the first and the last character.
    """

    empty: bool
    first: frozenset[int]
    last: frozenset[int]


class _Parser:
    """Reads an expression.

    Attributes:
        classes: the characters of each position.
        follow: the positions after each position.
    """

    def __init__(self, pattern: str, work: Work) -> None:
        self.classes: list[frozenset[str]] = []
        self.follow: list[set[int]] = []
        self._pattern = pattern
        self._at = 0
        self._work = work

    def parse(self) -> _Fragment:
        whole = self._alternatives()
        if self._at < len(self._pattern):
            raise ValueError(f"character {self._at} of the pattern cannot be read")
        return whole

    @property
    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        if not self._next:
            raise ValueError("the pattern ends early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _alternatives(self) -> _Fragment:
        found = self._sequence()
        while self._next == "|":
            self._at += 1
            other = self._sequence()
            self._work.spend(len(found.first) + len(found.last) + len(other.last))
            found = _Fragment(
                found.empty or other.empty, found.first | other.first, found.last | other.last
            )
        return found

    def _sequence(self) -> _Fragment:
        found = _Fragment(True, frozenset(), frozenset())
        while self._next and self._next not in "|)":
            found = self._join(found, self._repeated())
        return found

    def _join(self, one: _Fragment, two: _Fragment) -> _Fragment:
        self._work.spend(_STEP + len(one.first) + len(two.last) + len(one.last) * len(two.first))
        for position in one.last:
            self.follow[position] |= two.first
        return _Fragment(
            one.empty and two.empty,
            one.first | two.first if one.empty else one.first,
            one.last | two.last if two.empty else two.last,
        )

    def _repeated(self) -> _Fragment:
        start = self._at
        atom = self._atom()
        end = self._at
        if (bounds := self._bounds()) is None:
            return atom
        least, most = bounds
        after = self._at
        copies = [atom, *(self._copy(start, end) for _ in range(1, most or max(least, 1)))]
        self._at = after
        found = _Fragment(True, frozenset(), frozenset())
        for number, copy in reversed(list(enumerate(copies))):
            if most is None and number == len(copies) - 1:
                self._work.spend(len(copy.last) * len(copy.first))
                for position in copy.last:
                    self.follow[position] |= copy.first
            # An optional copy includes all that follow it, so that there is one way to match.
            found = self._join(copy, found)
            if number >= least:
                found = found._replace(empty=True)
        return found if most != 0 else _Fragment(True, frozenset(), frozenset())

    def _copy(self, start: int, end: int) -> _Fragment:
        self._at = start
        copy = self._atom()
        assert self._at == end
        return copy

    def _bounds(self) -> tuple[int, int | None] | None:
        if self._next in ("*", "+", "?"):
            return _QUANTIFIERS[self._take()]
        if self._next != "{":
            return None
        end = self._pattern.index("}", self._at)
        least, comma, most = self._pattern[self._at + 1 : end].partition(",")
        self._at = end + 1
        bounds = int(least), int(most) if most else None if comma else int(least)
        if max(bounds[0], bounds[1] or 0) > _MOST_COPIES:
            raise ValueError(f"the pattern repeats more than {_MOST_COPIES} times")
        return bounds

    def _atom(self) -> _Fragment:
        char = self._take()
        if char == "(":
            if self._pattern.startswith("?:", self._at):
                self._at += 2
            found = self._alternatives()
            if self._take() != ")":
                raise ValueError("a group of the pattern does not end")
            return found
        if char == "[":
            return self._position(self._class())
        if char == "\\":
            return self._position(frozenset(self._escaped()))
        if char in _SPECIAL or char in _UNSUPPORTED:
            raise ValueError(f"the pattern holds {char} at character {self._at - 1}")
        return self._position(frozenset(char))

    def _escaped(self) -> str:
        char = self._take()
        if char.isalnum():
            raise ValueError(f"the pattern holds \\{char}")
        return char

    def _class(self) -> frozenset[str]:
        found: set[str] = set()
        if self._next == "^":
            raise ValueError("the pattern holds a negated class")
        while (char := self._take()) != "]":
            if char == "\\":
                char = self._escaped()
            if self._next == "-" and self._pattern[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._take()
                self._work.spend(_STEP * max(0, ord(last) - ord(char)))
                found.update(map(chr, range(ord(char), ord(last) + 1)))
            else:
                found.add(char)
        return frozenset(found)

    def _position(self, chars: frozenset[str]) -> _Fragment:
        self._work.spend(4 * _STEP + len(chars))
        here = frozenset([len(self.classes)])
        self.classes.append(chars)
        self.follow.append(set())
        return _Fragment(False, here, here)


def without_anchors(pattern: str) -> str:
    """A pattern without `^` at its beginning and `$` at its end."""
    body = pattern.removeprefix("^")
    return body[:-1] if _LAST_ANCHOR.search(body) else body


def characters(pattern: str, work: Work) -> frozenset[str]:
    """All characters of the strings that match a pattern.

    Args:
        pattern: may begin with `^` and end with `$`.
        work: bounds several patterns together.

    Raises:
        ValueError: the pattern holds an unsupported expression, or takes too much work.
    """
    parser = _Parser(without_anchors(pattern), work)
    parser.parse()
    return frozenset(itertools.chain.from_iterable(parser.classes))


def compile_pattern(
    pattern: str, least: int = 0, most: int | None = None, work: Work | None = None
) -> Automaton:
    """The automaton of the strings that match a pattern as a whole.

    Args:
        pattern: may begin with `^` and end with `$`.
        least, most: the length of the strings, in characters.
        work: bounds several patterns together.

    Raises:
        ValueError: the pattern holds an unsupported expression, or takes too much work.
    """
    work = work or Work()
    parser = _Parser(without_anchors(pattern), work)
    whole = parser.parse()
    counts = least > 0 or most is not None
    # A state is the set of positions that may come next, whether the string may end, its length.
    first = (whole.first, whole.empty, 0)
    states, numbers = [first], {first: 0}
    automaton = Automaton()
    # The loop appends to this list.
    for number, (coming, ends, length) in enumerate(states):
        automaton.moves.append({})
        if ends and length >= least:
            automaton.accepting.add(number)
        if most is not None and length == most:
            continue
        work.spend(_STEP * sum(len(parser.classes[position]) for position in coming))
        for char, taken in _by_char(parser, coming).items():
            work.spend(_STEP + sum(len(parser.follow[position]) for position in taken))
            after = frozenset(itertools.chain.from_iterable(parser.follow[p] for p in taken))
            # Counting stops where it no longer matters, so that the states stay few.
            longer = min(length + 1, least if most is None else most) if counts else 0
            state = (after, not taken.isdisjoint(whole.last), longer)
            if state not in numbers:
                numbers[state] = len(states)
                states.append(state)
            automaton.moves[-1][char] = numbers[state]
            if len(states) > _MOST_STATES:
                raise ValueError("the pattern needs too many states")
    return _without_dead_ends(automaton)


def _by_char(parser: _Parser, coming: frozenset[int]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for position in coming:
        for char in parser.classes[position]:
            found.setdefault(char, set()).add(position)
    return {char: frozenset(taken) for char, taken in sorted(found.items())}


def _without_dead_ends(automaton: Automaton) -> Automaton:
    """Removes the moves to states from which no string can end any more.

    Raises:
        ValueError: no string matches.
    """
    before: dict[int, set[int]] = {}
    for number, moves in enumerate(automaton.moves):
        for after in moves.values():
            before.setdefault(after, set()).add(number)
    alive, waiting = set(automaton.accepting), list(automaton.accepting)
    while waiting:
        for number in before.get(waiting.pop(), ()):
            if number not in alive:
                alive.add(number)
                waiting.append(number)
    if 0 not in alive:
        raise ValueError("no string matches the pattern")
    for moves in automaton.moves:
        for char in [char for char, after in moves.items() if after not in alive]:
            del moves[char]
    return automaton
