"""Answers of `/v1/completions`: the text of each choice, with its echo and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_sidecar.models.base import TokenLogprob
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
        # The model returns a prompt of tokens as text.
        self._echo = prompt if body.echo and isinstance(prompt, str) else ""
        self._logprobs = None if body.logprobs is None else LegacyLogprobs()
        self._tokens = 0

    def of(self, part: Part) -> Piece:
        """The piece that a part adds."""
        if isinstance(part, Finished):
            self.finished = part
            part = TextPart("", self._end_token(part))
        assert isinstance(part, TextPart), "a completion calls no tools"
        self._tokens += len(part.logprobs)
        echo, self._echo = self._echo + part.prompt_text, ""
        logprobs = None if self._logprobs is None else self._logprobs.of(echo, part)
        return Piece(echo + part.text, logprobs)

    def _end_token(self, finished: Finished) -> tuple[TokenLogprob, ...]:
        """The token with which the model ended the text, if it comes without its log probability.

        A client that requests one token expects one: lm-eval drops the last token.
        """
        completion = finished.completion
        if completion.finish_reason != "stop" or finished.at_stop_text:
            return ()
        is_missing = self._tokens < max(1, completion.completion_tokens)
        return (TokenLogprob(0, b"", None),) if is_missing else ()


def joined(pieces: Sequence[Piece]) -> Piece:
    """A whole choice."""
    text = "".join(piece.text for piece in pieces)
    first = pieces[0].logprobs
    if first is None:
        return Piece(text, None)
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Piece(
        text, {name: [entry for lists in logprobs for entry in lists[name]] for name in first}
    )
