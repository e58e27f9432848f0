"""Answers of `/v1/completions`: the text of each choice, with its echo and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from llm_sidecar.models.base import Completion, TokenLogprob
from llm_sidecar.services.conversation import Finished, Part, TextPart
from osiris.openai.logprobs import LegacyLogprobs
from osiris.openai.schemas.completions import CompletionRequest, Prompt


class Piece(NamedTuple):
    """A piece of a choice; without log probabilities unless requested."""

    text: str
    logprobs: dict[str, list[Any]] | None


class CompletionChoice:
    """One choice, from its parts.

    Attributes:
        finished: its end; None before.
    """

    def __init__(self, body: CompletionRequest, prompt: Prompt) -> None:
        """Begins a choice for a prompt."""
        self.finished: Finished | None = None
        self._prompt = prompt
        self._echo_due = bool(body.echo)
        # The model generates one token that is not shown: see `osiris.openai.completions`.
        self._is_echo_only = body.max_tokens == 0
        self._logprobs = None if body.logprobs is None else LegacyLogprobs()

    def of(self, part: Part) -> Piece:
        """The piece that a part adds; none while the text of the prompt is unknown."""
        if isinstance(part, Finished):
            self.finished = self._end(part)
            part = TextPart("", _end_token(part.completion))
        assert isinstance(part, TextPart), "a completion calls no tools"
        echo = self._echo(part)
        if self._is_echo_only:
            part = replace(part, text="", logprobs=())
        tokens = (*part.prompt_logprobs, *part.logprobs)
        logprobs = None if self._logprobs is None else self._logprobs.of(tokens)
        return Piece(echo + part.text, logprobs)

    def _echo(self, part: TextPart) -> str:
        """The prompt as text, once: from its tokens, if it came as tokens."""
        if not self._echo_due or not (isinstance(self._prompt, str) or part.prompt_logprobs):
            return ""
        self._echo_due = False
        if isinstance(self._prompt, str):
            return self._prompt
        return b"".join(token.data for token in part.prompt_logprobs).decode(errors="replace")

    def _end(self, finished: Finished) -> Finished:
        if not self._is_echo_only:
            return finished
        return Finished("length", replace(finished.completion, completion_tokens=0))


def _end_token(completion: Completion) -> tuple[TokenLogprob, ...]:
    """The token that ended the text, if it comes without its log probability.

    A client that requests one token expects one: lm-eval drops the last token.
    """
    tokens = max(1, completion.completion_tokens)
    has_ended = completion.finish_reason == "stop" and len(completion.logprobs) < tokens
    return (TokenLogprob(0, b"", None),) if has_ended else ()


def joined(pieces: Sequence[Piece]) -> Piece:
    """A whole choice."""
    text = "".join(piece.text for piece in pieces)
    first = pieces[0].logprobs
    if first is None:
        return Piece(text, None)
    found = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Piece(text, {name: [one for lists in found for one in lists[name]] for name in first})
