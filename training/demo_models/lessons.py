"""Lessons, and their encoding: which tokens of a chat have a loss, and where to attend for them."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from llm_sidecar.engines import Message

IGNORED: Final = -100
"""Label of a token without a loss (torch's convention)."""

HintKind = Literal["copied", "side", "situation", "range", "word"]
"""What to attend to: characters to copy, the words that state the side or the situation, the
average true range, which decides the distances, or, within a prompt, the start of a word."""

_WORD: Final = re.compile(r"[A-Z\d^](?:[A-Z\d.^/=-]*[A-Z\d])?(?![a-z])")
"""A code or a number; mostly several tokens, because each capital and each digit is one."""
_MOST_WORDS: Final = 16
"""Roughly the most words of a prompt that get attention targets."""


class Hint(NamedTuple):
    """The slices of the last user message that a span of the answer depends on.

    Attributes:
        kind: for `copied`, each source holds the same characters as the span, and every token of
            the span gets a target. For other kinds only the first token does.
        first, last: the span, a slice of the characters of the answer.
        sources: slices of the characters of the user message; empty if unknown. None means that
            the message states nothing of this kind; attention then belongs on its first token.
    """

    kind: HintKind
    first: int
    last: int
    sources: Sequence[tuple[int, int]] | None


class Lesson(NamedTuple):
    """One chat to train on.

    Attributes:
        messages: the last is the assistant's, the one before it the user's.
        first, last: a slice of the characters of the last message; training sees only these, which
            costs less than the whole message.
        hints: for spans of the last message.
    """

    messages: Sequence[Message]
    first: int = 0
    last: int | None = None
    hints: Sequence[Hint] = ()


LessonSource = Callable[[float], Lesson]
"""Draws the next lesson, given the training progress in [0, 1]."""


class AttentionTarget(NamedTuple):
    """The token at `position` should attend to those at `sources`, all indexes into the chat."""

    kind: HintKind
    position: int
    sources: Sequence[int]


class Encoded(NamedTuple):
    """A lesson as tokens.

    Attributes:
        ids: of all tokens.
        labels: equal to `ids` in the assistant's turns, `IGNORED` elsewhere.
        attention_targets: from the hints, and from the words of the prompt.
        decisions: positions of the first token of each hint's span.
        shared: number of leading tokens of a system message, which many lessons have in common.
    """

    ids: list[int]
    labels: list[int]
    attention_targets: list[AttentionTarget]
    decisions: list[int]
    shared: int

    @property
    def own(self) -> int:
        """Number of tokens after the shared ones."""
        return len(self.ids) - self.shared


class _Token(NamedTuple):
    """A token: its position in the chat, and its characters in its message, as a slice."""

    position: int
    first: int
    last: int


def encode(tokenizer: Any, lesson: Lesson) -> Encoded:
    """Encodes the chat with the tokenizer's template; labels the assistant's turns."""
    ids: list[int] = []
    labels: list[int] = []
    prompt_tokens: list[_Token] = []
    prompt = ""
    answer_tokens: list[_Token] = []
    shared = 0
    header, end_of_turn, rest = _reply_frame(tokenizer)
    for message in lesson.messages:
        content = message["content"]
        if message["role"] != "assistant":
            before, after = _frame(tokenizer, message["role"])
            turn, positions = _tokens(tokenizer, before + content + after, len(ids), len(before))
            if message["role"] == "user":
                prompt_tokens, prompt = positions, content
            elif not ids:
                shared = len(turn)
            ids += turn
            labels += [IGNORED] * len(turn)
            continue
        ids += header
        labels += [IGNORED] * len(header)
        is_last = message is lesson.messages[-1]
        first, last = (lesson.first, lesson.last) if is_last else (0, None)
        reply, answer_tokens = _tokens(tokenizer, content, len(ids), 0, first, last)
        if last is None:
            reply = reply + end_of_turn
        ids += reply
        labels += reply
        if not is_last:
            ids += rest
            labels += [IGNORED] * len(rest)
    targets = [
        target for hint in lesson.hints for target in _targets(hint, prompt_tokens, answer_tokens)
    ]
    if targets:
        targets += _word_targets(prompt, prompt_tokens)
    decisions = [
        begun[0].position
        for hint in lesson.hints
        if (begun := _overlapping(answer_tokens, hint.first, hint.last))
    ]
    return Encoded(ids, labels, targets, decisions, shared)


@functools.lru_cache(maxsize=8)
def _frame(tokenizer: Any, role: str) -> tuple[str, str]:
    """The text that the template puts before and after a message."""
    turn: str = tokenizer.apply_chat_template([{"role": role, "content": "\0"}], tokenize=False)
    before, after = turn.split("\0")
    return before, after


class _ReplyFrame(NamedTuple):
    """Tokens before an assistant's message, at its end, and between that and the next turn."""

    before: list[int]
    end: list[int]
    after: list[int]


@functools.lru_cache(maxsize=4)
def _reply_frame(tokenizer: Any) -> _ReplyFrame:
    user = [{"role": "user", "content": "?"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    header = whole[len(tokenizer.apply_chat_template(user, tokenize=False)) :]
    return _ReplyFrame(
        tokenizer.encode(header, add_special_tokens=False),
        [tokenizer.eos_token_id],
        tokenizer.encode("\n", add_special_tokens=False),
    )


@functools.lru_cache(maxsize=16)
def _encoding(tokenizer: Any, text: str) -> Any:
    """The encoding of the `tokenizers` package. Cached: most chats have the same system message."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


def _tokens(
    tokenizer: Any, text: str, start: int, content: int, first: int = 0, last: int | None = None
) -> tuple[list[int], list[_Token]]:
    """Encodes `text`; returns the tokens that start in `first` to `last`, and where they are.

    Args:
        start: position of the first returned token in the chat.
        content: index of the message's first character in `text`.
    """
    encoding = _encoding(tokenizer, text)
    last = len(text) if last is None else last
    selected = [
        (token, begin, end)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if first <= begin < last
    ]
    positions = [
        _Token(start + index, begin - content, end - content)
        for index, (_, begin, end) in enumerate(selected)
    ]
    return [token for token, _, _ in selected], positions


def _overlapping(tokens: Sequence[_Token], first: int, last: int) -> Sequence[_Token]:
    """The tokens that overlap the characters from `first` to `last`."""
    begin = bisect.bisect_right(tokens, first, key=lambda token: token.last)
    end = bisect.bisect_left(tokens, last, key=lambda token: token.first)
    return tokens[begin:end]


def _targets(
    hint: Hint, prompt_tokens: Sequence[_Token], answer_tokens: Sequence[_Token]
) -> Iterator[AttentionTarget]:
    """The targets of one hint. The token before the predicted one attends to the sources.

    Attention is causal, so the state of a word's first token cannot depend on the rest of the word;
    those of its last token and of the one after it can. The first copied token attends to these to
    find the word, and the token after the copy to find that the word ends.
    """
    piece = _overlapping(answer_tokens, hint.first, hint.last)
    if not piece:
        return
    if hint.kind == "copied":
        for number, token in enumerate([*piece, *_next_token(answer_tokens, hint.last)]):
            sources: set[int] = set()
            offset = max(token.first, hint.first) - hint.first
            for first, last in hint.sources or ():
                end = _next_token(prompt_tokens, last)
                if number == 0:
                    sources |= {
                        t.position for t in (*_overlapping(prompt_tokens, last - 1, last), *end)
                    }
                elif token.first < hint.last:
                    sources |= {
                        t.position
                        for t in _overlapping(prompt_tokens, first + offset, first + offset + 1)
                    }
                else:
                    sources |= {t.position for t in end}
            if sources:
                yield AttentionTarget(hint.kind, token.position - 1, sorted(sources))
        return
    sources = set() if hint.sources is not None else {prompt_tokens[0].position}
    for first, last in hint.sources or ():
        sources |= {t.position for t in _overlapping(prompt_tokens, first, last)}
        if hint.kind == "side":
            sources |= {t.position for t in _next_token(prompt_tokens, last)}
    if sources:
        yield AttentionTarget(hint.kind, piece[0].position - 1, sorted(sources))


def _word_targets(text: str, tokens: Sequence[_Token]) -> Iterator[AttentionTarget]:
    """Targets from all tokens of a word, and from the one after it, to the word's first token."""
    words = [
        [*_overlapping(tokens, *match.span()), *_next_token(tokens, match.end())]
        for match in _WORD.finditer(text)
    ]
    for word in words[:: 1 + len(words) // _MOST_WORDS]:
        for token in word[1:]:
            yield AttentionTarget("word", token.position, [word[0].position])


def _next_token(tokens: Sequence[_Token], last: int) -> Sequence[_Token]:
    """The first token that starts at character `last` or later: a list of one or none."""
    begin = bisect.bisect_left(tokens, last, key=lambda token: token.first)
    return tokens[begin : begin + 1]
