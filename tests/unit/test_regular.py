"""Regular expressions as automata."""

from __future__ import annotations

import itertools
import re

import pytest

from llm_sidecar.engines import regular
from llm_sidecar.engines.regular import Automaton, compile_pattern


def accepts(automaton: Automaton, text: str) -> bool:
    state = 0
    for char in text:
        if char not in automaton.moves[state]:
            return False
        state = automaton.moves[state][char]
    return state in automaton.accepting


@pytest.mark.parametrize(
    "pattern",
    [
        "ab",
        "^ab$",
        "a|b|",
        "(a|b)*c",
        "a+",
        "a?b?c?",
        "(ab){2}",
        "a{0,2}b",
        "a{2,}",
        "a{0}b",
        "(?:ab|c){1,2}",
        "(a?b){2,3}",
        "[a-c]{2}",
        "[ac-]",
        "[c]a{1,2}|b",
        r"\.a|\-",
        "(a*)*",
        "((a|b){0,2}c)*(a|b)?",
    ],
)
def test_an_automaton_accepts_what_the_expression_matches(pattern: str) -> None:
    automaton = compile_pattern(pattern)
    for length in range(5):
        for chars in itertools.product("abc.-", repeat=length):
            text = "".join(chars)
            assert accepts(automaton, text) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize(("least", "most"), [(2, 3), (0, 2), (3, None), (1, 1)])
def test_bounds_of_the_length_hold_beside_the_expression(least: int, most: int | None) -> None:
    automaton = compile_pattern("a(bc?)*", least, most)
    for length in range(6):
        for chars in itertools.product("abc", repeat=length):
            text = "".join(chars)
            within = least <= length <= (length if most is None else most)
            expected = within and re.fullmatch("a(bc?)*", text) is not None
            assert accepts(automaton, text) == expected, text


def test_no_state_leads_nowhere() -> None:
    automaton = compile_pattern("(ab)*c", most=3)
    # After `ab` only `c` fits the length.
    assert set(automaton.moves[automaton.moves[automaton.moves[0]["a"]]["b"]]) == {"c"}


def test_equal_ends_share_their_states() -> None:
    assert len(compile_pattern("(a|b|c|d)[0-9]{3}").moves) == 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", "the pattern ends early"),
        ("a)", "character 1 of the pattern cannot be read"),
        ("[a", "the pattern ends early"),
        ("[^a]", "the pattern holds a negated class"),
        (".*", "the pattern holds . at character 0"),
        (r"\d", r"the pattern holds \d"),
        ("a{1,2000}", "the pattern repeats more than 1000 times"),
        ("*", "the pattern holds * at character 0"),
    ],
)
def test_what_cannot_be_read_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compile_pattern(pattern)


def test_an_expression_without_any_string_is_refused() -> None:
    with pytest.raises(ValueError, match="no string matches the pattern"):
        compile_pattern("abc", most=2)


def test_the_number_of_states_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular, "_MOST_STATES", 100)
    assert len(compile_pattern("(a|b)*a(a|b){5}").moves) == 64
    with pytest.raises(ValueError, match="too many states"):
        compile_pattern("(a|b)*a(a|b){6}")


@pytest.mark.parametrize(
    "pattern", ["((a?){100}){100}", "[\0-\U0010ffff]", "(a|b){50}", "a|" * 50, "[a-z]{0,50}"]
)
def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(regular, "_MOST_WORK", 10_000)
    with pytest.raises(ValueError, match="too much work"):
        compile_pattern(pattern)
