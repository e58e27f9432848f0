"""The parts of an answer: text, tool calls and its end. Truncates text before a stop text."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from llm_sidecar.models.base import Completion, TokenLogprob

Reason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended; a deadline counts as `length`."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of the answer, generated since the part before.

    Attributes:
        logprobs: of its tokens, if requested.
        prompt_logprobs: of all tokens of the prompt, in one part, if requested.
        prompt_text: the prompt as text, in the same part, if requested.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_text: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A piece of a tool call.

    Attributes:
        index: of the call in the answer, from 0.
        call_id: the same in all parts of the call.
        name: of the tool, the same in all parts.
        arguments: JSON text since the part before.
    """

    index: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: see `Reason`.
        completion: of the model, without its text and log probabilities, which the parts have.
        grounded: of a proposal: `true`, or the ungrounded fields; None for another answer.
        at_stop_text: whether a stop text ended it, not the model.
    """

    reason: Reason
    completion: Completion
    grounded: str | None = None
    at_stop_text: bool = False


Part = TextPart | ToolCallPart | Finished


def joined(parts: Sequence[Part]) -> Iterator[Part]:
    """The same answer in as few parts as possible."""
    for _, group in itertools.groupby(parts, key=_item):
        first, *rest = group
        match first:
            case TextPart():
                texts = [first, *(part for part in rest if isinstance(part, TextPart))]
                yield TextPart(
                    "".join(part.text for part in texts),
                    tuple(token for part in texts for token in part.logprobs),
                    tuple(token for part in texts for token in part.prompt_logprobs),
                    "".join(part.prompt_text for part in texts),
                )
            case ToolCallPart():
                calls = [first, *(part for part in rest if isinstance(part, ToolCallPart))]
                yield replace(first, arguments="".join(part.arguments for part in calls))
            case Finished():
                yield first


def _item(part: Part) -> str | None:
    """The call that a part belongs to, an empty text for text, None for the end."""
    match part:
        case TextPart():
            return ""
        case ToolCallPart():
            return part.call_id
        case Finished():
            return None


class TextAnswer:
    """The text of an answer up to the first of some stop texts.

    Text that may be the beginning of a stop text is held back until more is known.

    Attributes:
        stopped: whether a stop text was found; the answer ends before it.
    """

    has_call: Final = False
    """Whether it is a tool call, as in `ToolAnswer`."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        """Args: stop: the stop texts, each of at least one character."""
        self.stopped = False
        self._stop = stop
        self._held = ""
        self._tokens: deque[TokenLogprob] = deque()
        self._text_bytes = self._token_bytes = 0

    def feed(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> list[TextPart]:
        """The text that is certain after this delta, if any."""
        if self.stopped:
            return []
        if not self._stop:
            return _part(text, tuple(logprobs))
        self._held += text
        self._tokens.extend(logprobs)
        return self._take(self._end())

    def finish(self, *, is_whole: bool = True) -> list[TextPart]:
        """The rest, once the model has ended; text may end anywhere."""
        return [] if self.stopped else self._take(len(self._held), with_all_tokens=True)

    def _end(self) -> int:
        """The length of the held text that certainly belongs to the answer."""
        starts = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if starts:
            self.stopped = True
            return min(starts)
        return len(self._held) - max(_overlap(self._held, text) for text in self._stop)

    def _take(self, end: int, *, with_all_tokens: bool = False) -> list[TextPart]:
        text, self._held = self._held[:end], self._held[end:]
        self._text_bytes += len(text.encode())
        tokens: list[TokenLogprob] = []
        while self._tokens and (with_all_tokens or self._token_bytes < self._text_bytes):
            tokens.append(self._tokens.popleft())
            self._token_bytes += len(tokens[-1].data)
        return _part(text, tuple(tokens))


def _part(text: str, logprobs: tuple[TokenLogprob, ...]) -> list[TextPart]:
    return [TextPart(text, logprobs)] if text or logprobs else []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
