"""The parts of an answer: text, tool calls and its end. Truncates text before a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from llm_sidecar.models.base import Completion, TokenLogprob

Reason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended; a deadline counts as `length`."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of the answer, generated since the part before.

    Attributes:
        logprobs: of its tokens, if requested.
        prompt_logprobs: of all tokens of the prompt, in the first part that has any.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


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
        completion: of the model, with its whole text and counts.
        grounded: of a proposal: `true`, or the ungrounded fields; None for another answer.
    """

    reason: Reason
    completion: Completion
    grounded: str | None = None


Part = TextPart | ToolCallPart | Finished


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
        return self._give(self._end())

    def finish(self, *, is_whole: bool = True) -> list[TextPart]:
        """The rest, once the model has ended; text may end anywhere."""
        return [] if self.stopped else self._give(len(self._held), with_all_tokens=True)

    def _end(self) -> int:
        """The length of the held text that certainly belongs to the answer."""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        return len(self._held) - max(_overlap(self._held, text) for text in self._stop)

    def _give(self, end: int, *, with_all_tokens: bool = False) -> list[TextPart]:
        text, self._held = self._held[:end], self._held[end:]
        self._text_bytes += len(text.encode())
        given: list[TokenLogprob] = []
        while self._tokens and (with_all_tokens or self._token_bytes < self._text_bytes):
            given.append(self._tokens.popleft())
            self._token_bytes += len(given[-1].data)
        return _part(text, tuple(given))


def _part(text: str, logprobs: tuple[TokenLogprob, ...]) -> list[TextPart]:
    return [TextPart(text, logprobs)] if text or logprobs else []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
