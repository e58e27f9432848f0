"""Lessons as tokens: what is learned of a chat, and where its answer is to be found."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from llm_sidecar.engines import Message

IGNORED: Final = -100
"""Label of a token that no loss is taken of (torch's convention)."""

Way = Literal["copied", "side", "situation", "range", "word"]
"""What is looked for: characters to copy, the words that tell the side or the situation, the average
true range, by which distances are chosen, or, within a prompt, where a word begins."""

_WORD: Final = re.compile(r"[A-Z\d^](?:[A-Z\d.^/=-]*[A-Z\d])?(?![a-z])")
"""A code or a number: mostly of many tokens, as capitals and digits are kept apart."""
_WORDS_TAUGHT: Final = 16


class Hint(NamedTuple):
    """Where in the last user message a piece of the answer is to be found.

    Attributes:
        way: where it is `copied`, each character of the piece stands at the same place in each
            source. Otherwise the sources decide how the piece begins.
        first, last: the piece's characters in the answer, as of a slice.
        sources: slices of the user's message, empty where they are not known; None where it says
            nothing of it, and attention belongs on the message's beginning.
    """

    way: Way
    first: int
    last: int
    sources: Sequence[tuple[int, int]] | None


class Lesson(NamedTuple):
    """One chat to learn from.

    Attributes:
        messages: the last is the assistant's, the one before it the user's.
        first, last: the characters of its text that are shown, as of a slice. A short piece teaches
            what it holds at a part of the cost.
        hints: to parts of that text.
    """

    messages: Sequence[Message]
    first: int = 0
    last: int | None = None
    hints: Sequence[Hint] = ()


Teacher = Callable[[float], Lesson]
"""Gives the next lesson for the part of the training that is done, 0 to 1."""


class Look(NamedTuple):
    """Where attention belongs when a token is predicted: `sources` are positions, as is `at`."""

    way: Way
    at: int
    sources: Sequence[int]


class Encoded(NamedTuple):
    """One lesson as tokens.

    Attributes:
        ids: of all its tokens.
        labels: the same, and `IGNORED` outside the assistant's turns.
        looks: from the hints, for those tokens that have sources, and along the prompt's words.
        decisions: positions of the tokens that begin a hint's piece.
        shared: how many of the first tokens are a system message's, as in many lessons.
    """

    ids: list[int]
    labels: list[int]
    looks: list[Look]
    decisions: list[int]
    shared: int

    @property
    def own(self) -> int:
        """How many tokens are this lesson's own."""
        return len(self.ids) - self.shared


class _Placed(NamedTuple):
    """A token: its place in the chat, and its characters in its message's text."""

    at: int
    first: int
    last: int


def encode(tokenizer: Any, lesson: Lesson) -> Encoded:
    """The chat as the template writes it, with labels on the assistant's turns and their end."""
    ids: list[int] = []
    labels: list[int] = []
    asked: list[_Placed] = []
    question = ""
    answered: list[_Placed] = []
    shared = 0
    header, end_of_turn, rest = _around_a_reply(tokenizer)
    for message in lesson.messages:
        content = message["content"]
        if message["role"] != "assistant":
            before, after = _around(tokenizer, message["role"])
            turn, places = _tokens(tokenizer, before + content + after, len(ids), len(before))
            if message["role"] == "user":
                asked, question = places, content
            elif not ids:
                shared = len(turn)
            ids += turn
            labels += [IGNORED] * len(turn)
            continue
        ids += header
        labels += [IGNORED] * len(header)
        is_last = message is lesson.messages[-1]
        first, last = (lesson.first, lesson.last) if is_last else (0, None)
        reply, answered = _tokens(tokenizer, content, len(ids), 0, first, last)
        if last is None:
            reply = reply + end_of_turn
        ids += reply
        labels += reply
        if not is_last:
            ids += rest
            labels += [IGNORED] * len(rest)
    looks = [look for hint in lesson.hints for look in _looks(hint, asked, answered)]
    if looks:
        looks += _word_looks(question, asked)
    decisions = [
        begun[0].at for hint in lesson.hints if (begun := _within(answered, hint.first, hint.last))
    ]
    return Encoded(ids, labels, looks, decisions, shared)


@functools.lru_cache(maxsize=8)
def _around(tokenizer: Any, role: str) -> tuple[str, str]:
    """What the template writes before and after a message."""
    turn: str = tokenizer.apply_chat_template([{"role": role, "content": "\0"}], tokenize=False)
    before, after = turn.split("\0")
    return before, after


class _AroundReply(NamedTuple):
    """Tokens before an assistant's reply, at its end, and between that and the next turn."""

    before: list[int]
    end: list[int]
    after: list[int]


@functools.lru_cache(maxsize=4)
def _around_a_reply(tokenizer: Any) -> _AroundReply:
    user = [{"role": "user", "content": "?"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    header = whole[len(tokenizer.apply_chat_template(user, tokenize=False)) :]
    return _AroundReply(
        tokenizer.encode(header, add_special_tokens=False),
        [tokenizer.eos_token_id],
        tokenizer.encode("\n", add_special_tokens=False),
    )


@functools.lru_cache(maxsize=16)
def _encoding(tokenizer: Any, text: str) -> Any:
    """As the `tokenizers` package gives it; the system's message is the same in most chats."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


def _tokens(
    tokenizer: Any, text: str, start: int, content: int, first: int = 0, last: int | None = None
) -> tuple[list[int], list[_Placed]]:
    """The tokens of the whole text that begin within `first` and `last`, and their places.

    Args:
        start: place of the first of them in the chat.
        content: where in `text` the message's own text begins.
    """
    encoding = _encoding(tokenizer, text)
    last = len(text) if last is None else last
    chosen = [
        (token, begin, end)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if first <= begin < last
    ]
    places = [
        _Placed(start + index, begin - content, end - content)
        for index, (_, begin, end) in enumerate(chosen)
    ]
    return [token for token, _, _ in chosen], places


def _within(tokens: Sequence[_Placed], first: int, last: int) -> Sequence[_Placed]:
    """Those that have one of the characters from `first` up to `last`."""
    begin = bisect.bisect_right(tokens, first, key=lambda token: token.last)
    end = bisect.bisect_left(tokens, last, key=lambda token: token.first)
    return tokens[begin:end]


def _looks(hint: Hint, asked: Sequence[_Placed], answered: Sequence[_Placed]) -> Iterator[Look]:
    """A token is predicted where the one before it stands, so that is where to look from.

    Attention is causal: what a word's first token holds knows nothing of the word, which the last
    one and the one behind it do. So these say which word it is that is copied, and that it ends.
    """
    piece = _within(answered, hint.first, hint.last)
    if not piece:
        return
    if hint.way == "copied":
        for number, token in enumerate([*piece, *_behind(answered, hint.last)]):
            sources: set[int] = set()
            offset = max(token.first, hint.first) - hint.first
            for first, last in hint.sources or ():
                end = _behind(asked, last)
                if number == 0:
                    sources |= {t.at for t in (*_within(asked, last - 1, last), *end)}
                elif token.first < hint.last:
                    sources |= {t.at for t in _within(asked, first + offset, first + offset + 1)}
                else:
                    sources |= {t.at for t in end}
            if sources:
                yield Look(hint.way, token.at - 1, sorted(sources))
        return
    sources = set() if hint.sources is not None else {asked[0].at}
    for first, last in hint.sources or ():
        sources |= {t.at for t in _within(asked, first, last)}
        if hint.way == "side":
            sources |= {t.at for t in _behind(asked, last)}
    if sources:
        yield Look(hint.way, piece[0].at - 1, sorted(sources))


def _word_looks(text: str, tokens: Sequence[_Placed]) -> Iterator[Look]:
    """From all tokens of a word, and the one behind it, to the first."""
    words = [
        [*_within(tokens, *match.span()), *_behind(tokens, match.end())]
        for match in _WORD.finditer(text)
    ]
    for word in words[:: 1 + len(words) // _WORDS_TAUGHT]:
        for token in word[1:]:
            yield Look("word", token.at, [word[0].at])


def _behind(tokens: Sequence[_Placed], last: int) -> Sequence[_Placed]:
    """The first token that begins at character `last` or later, if there is one."""
    begin = bisect.bisect_left(tokens, last, key=lambda token: token.first)
    return tokens[begin : begin + 1]
