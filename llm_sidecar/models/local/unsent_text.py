"""The text of a completion that a worker generates, until it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_sidecar.engines.base import Delta, TokenLogprob
from llm_sidecar.models.local.protocol import Progress
from llm_sidecar.text import cleaned


@dataclass(slots=True)
class UnsentText:
    """The text generated for a job, and how much of it was sent.

    Attributes:
        unsent: text that has not been sent.
        logprobs: of its tokens.
        prompt_logprobs: those that have not been sent.
        tokens, sent_tokens: completion tokens so far.
        sent_at: when text was last sent.
    """

    unsent: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    sent_tokens: int = 0
    sent_at: float = 0.0

    def add(self, delta: Delta) -> None:
        """Adds what a step has generated."""
        self.unsent += cleaned(delta.text)
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.tokens = delta.completion_tokens

    def progress(self, number: int, delta: Delta, now: float) -> Progress:
        """All text that has not been sent, with the counts of the latest delta."""
        progress = Progress(
            id=number,
            text=self.unsent,
            prompt_tokens=delta.prompt_tokens,
            completion_tokens=self.tokens,
            cached_tokens=delta.cached_tokens,
            new_tokens=self.tokens - self.sent_tokens,
            finish_reason=delta.finish_reason,
            logprobs=tuple(self.logprobs),
        )
        self.logprobs.clear()
        self.unsent, self.sent_tokens, self.sent_at = "", self.tokens, now
        return progress
