"""Phi-3's lessons: chats of prompts and proposals, with hints where a prompt holds the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Final

from llm_sidecar.engines import Message
from llm_sidecar.proposals import Example, build_messages, dumps
from training.demo_models.cases import Case
from training.demo_models.lessons import Hint, Lesson, LessonSource
from training.demo_models.market import LONGEST_PROMPT, draw
from training.demo_models.positions import SIDE_WORDS
from training.demo_models.situations import Side
from training.demo_models.tickers import Split

_SHORTEST_LIMIT: Final = 70
"""Most characters of a prompt at the beginning of the curriculum."""
_SHORT, _LONG, _FINAL = 0.2, 0.6, 0.8
"""Training progress at which prompts begin to grow, have their full length, and become whole chats
as the server sends them."""
_TURNS: Final = (1, 1, 1, 1, 1, 1, 1, 1, 2, 3)
"""Numbers of prompts in a chat, drawn with equal chances."""
_DECIDED: Final = '_stop_pct"'
"""A short lesson ends before this text of the answer. Ticker, action and side come before it;
`"new` does too, so that the model also learns to leave the side out."""
_TERSE: Final = re.compile(r"[-+]\d.*|[LSB](?:\d.*)?|LNG|SHRT|SLD|SELL", re.IGNORECASE)
"""The shortest ways to state a side."""
_TIMES_HARD: Final = 3
_MOST_WAITING: Final = 512
"""Number of waiting repeats from which one of them is drawn."""


def curriculum(seed: int, split: Split = "train") -> LessonSource:
    """Draws lessons of growing length: short prompts with a part of the answer first, chats last.

    In a short prompt attention soon finds what to copy and what to judge, and learns from there to
    find it in long ones. A model this small learns neither if it starts with long prompts. A short
    prompt without a system message costs a fifth of a whole chat.
    """
    rng = Random(seed)
    cases = _CaseSource(rng, split)

    def lesson(progress: float) -> Lesson:
        grown = min(1.0, max(0.0, (progress - _SHORT) / (_LONG - _SHORT)))
        limit = _SHORTEST_LIMIT + round(grown * (LONGEST_PROMPT - _SHORTEST_LIMIT))
        final = progress > _FINAL
        whole = rng.random() < (0.5 if final else 0.05 + 0.4 * grown)
        turns = rng.choice(_TURNS) if final else 1
        messages, text, found = _chat([cases.draw(limit) for _ in range(turns)])
        if not final and rng.random() > 0.3 * grown:
            messages = messages[1:]
        if whole:
            return Lesson(messages, hints=found)
        if rng.random() < 0.65:
            return Lesson(messages, last=text.index(_DECIDED), hints=found)
        return Lesson(messages, first=text.index('"rationale"'), hints=found)

    return lesson


def second_round(seed: int) -> LessonSource:
    """Draws lessons for a model trained on `curriculum`: chats as the server sends them.

    Three of five stop after ticker, action and side.
    """
    rng = Random(seed)
    cases = _CaseSource(rng, "train")

    def lesson(progress: float) -> Lesson:
        del progress
        turns = rng.choice(_TURNS)
        messages, text, found = _chat([cases.draw(LONGEST_PROMPT) for _ in range(turns)])
        last = None if rng.random() < 0.4 else text.index(_DECIDED)
        return Lesson(messages, last=last, hints=found)

    return lesson


def candidates(seed: int) -> LessonSource:
    """Draws candidates for hard lessons: one prompt each, with ticker, action and side."""
    rng = Random(seed)

    def lesson(progress: float) -> Lesson:
        del progress
        messages, text, found = _chat([draw(rng, "train")])
        return Lesson(messages, last=text.index(_DECIDED), hints=found)

    return lesson


def _chat(cases: Sequence[Case]) -> tuple[list[Message], str, list[Hint]]:
    """A chat of these cases, the text of its last answer, and the hints for that."""
    *before, last = cases
    examples = [Example(case.prompt, case.proposal) for case in before]
    text = dumps(last.proposal)
    messages = [*build_messages(last.prompt, examples), Message(role="assistant", content=text)]
    return messages, text, hints(last, text)


class _CaseSource:
    """Draws cases; each hard one comes three times, the others once.

    Hard are the shortest ways to state a side, and words of a side where none is stated. They are a
    sixth of all cases, and without repeats they were half of the model's errors.
    """

    def __init__(self, rng: Random, split: Split) -> None:
        self._rng = rng
        self._split = split
        self._waiting: list[Case] = []

    def draw(self, longest: int) -> Case:
        """A case of at most `longest` characters, which must not shrink between calls."""
        if len(self._waiting) >= _MOST_WAITING:
            return self._waiting.pop(self._rng.randrange(len(self._waiting)))
        case = draw(self._rng, self._split, longest)
        if _is_hard(case):
            self._waiting += [case] * (_TIMES_HARD - 1)
        return case


def _is_hard(case: Case) -> bool:
    """Whether the side is stated in one of the shortest ways, or only words of a side are there."""
    if "side" in case.proposal:
        return any(_TERSE.fullmatch(position) for position in case.positions)
    return any(words.search(case.prompt) for words in SIDE_WORDS.values())


def hints(case: Case, text: str) -> list[Hint]:
    """The slices of the prompt that its answer `text` copies or depends on."""
    prompt = case.prompt
    ticker = _value(text, "ticker")
    found = [Hint("copied", *ticker, _whole(text[slice(*ticker)], prompt))]
    for number in _STATED_NUMBER.finditer(text, text.index('"rationale"')):
        found.append(Hint("copied", *number.span(), _whole(number[0], prompt)))
    side = case.proposal.get("side")
    words = _side_words(case, side) if side else None
    # Without a side, the name of the next field comes where the side's would be.
    name = text.index("side" if side else "new_stop_pct")
    found.append(Hint("side", name, name + 3, words))
    for field in ("action", "side") if side else ("action",):
        found.append(Hint("side", *_value(text, field), words))
    phrases: list[tuple[int, int]] = []
    for phrase in case.phrases:
        # A number alone may occur anywhere; the right one is just after its name.
        numeric = not any(character.isalpha() for character in phrase)
        end = phrases[-1][1] if phrases else len(prompt)
        near = (end, end + _NEAR + len(phrase)) if numeric else (0, len(prompt))
        start = prompt.lower().find(phrase.lower(), *near)
        if start >= 0:
            phrases.append((start, start + len(phrase)))
    atr = _whole(case.atr, prompt) if case.atr else None
    for field in ("action", "new_stop_pct", "new_target_pct", "confidence", "rationale"):
        found.append(Hint("situation", *_value(text, field), phrases))
        if field.endswith("_pct"):
            found.append(Hint("range", *_value(text, field), atr))
    return found


def _side_words(case: Case, side: Side) -> list[tuple[int, int]]:
    """The words of the side within the phrases that state it; if there are none, all such words."""
    words = [match.span() for match in SIDE_WORDS[side].finditer(case.prompt)]
    spans = [
        span
        for position in case.positions
        for span in _whole(position.lower(), case.prompt.lower())
    ]
    stated = [
        word for word in words if any(first <= word[0] and word[1] <= last for first, last in spans)
    ]
    return stated or words


_NEAR: Final = 12
_STATED_NUMBER: Final = re.compile(r"(?<= )\d+(?:\.\d+)?")


def _value(text: str, field: str) -> tuple[int, int]:
    """The slice of a field's value in the JSON `text`, without its quotes."""
    found = re.compile(rf'"{field}":"?([^",}}]+)').search(text)
    if found is None:
        raise ValueError(f"no {field} in {text}")
    return found.span(1)


def _whole(word: str, prompt: str) -> list[tuple[int, int]]:
    """The slices of the prompt that are `word` as a whole word; if there are none, as part of a
    word."""
    found = []
    first = prompt.find(word)
    while first >= 0:
        found.append((first, first + len(word)))
        first = prompt.find(word, first + len(word))
    alone = [
        (first, last)
        for first, last in found
        if not _JOINED.match(prompt, first - 1, first) and not _JOINED.match(prompt, last)
    ]
    return alone or found


_JOINED: Final = re.compile(r"[A-Za-z\d]|\.\d")
