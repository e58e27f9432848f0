"""One completion: its tokens, as they are sampled, and their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llm_sidecar.engines.base import Delta, FinishReason, GenerationRequest, Sampling, TokenLogprob
from llm_sidecar.engines.context import PREFILL_CHUNK
from llm_sidecar.engines.logprobs import token_logprob
from llm_sidecar.engines.sampling import Logits, Sampler

if TYPE_CHECKING:
    from llm_sidecar.engines.guidance import Matcher

__all__ = ["Generation", "Logits"]


class Generation:
    """A completion so far, independent of the runtime.

    Attributes:
        prompt: its tokens.
        limit: maximum number of completion tokens.
        pending: the latest tokens, which the runtime has not processed yet.
        cached: prompt tokens whose states were cached.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        *,
        decode: Callable[[int], str],
        data: Callable[[int], bytes],
        ends: frozenset[int],
        sampling: Sampling,
        matcher: Matcher | None = None,
    ) -> None:
        """Starts with no tokens.

        Args:
            request: what to generate.
            prompt: its messages as tokens.
            decode: returns the text that the next token adds.
            data: returns the bytes of a token.
            ends: tokens that end a turn.
            sampling: how tokens are chosen.
            matcher: a new one, or None.
        """
        self.prompt = prompt
        self.limit = request.max_tokens
        self.pending: Sequence[int] = ()
        self.cached = 0
        self._decode = decode
        self._data = data
        self._ends = ends
        self._matcher = matcher
        self._sampler = Sampler(sampling, prompt, request.seed)
        self._logprobs = request.logprobs
        self._prompt_logprobs = request.prompt_logprobs
        self._read: list[TokenLogprob] = []
        self._count = 0
        self._begun = False
        self._ended = False

    @property
    def size(self) -> int:
        """The maximum number of prompt and completion tokens."""
        return len(self.prompt) + self.limit

    @property
    def finished(self) -> bool:
        """Whether the completion is finished."""
        return self._begun and (self._ended or self._count >= self.limit)

    def delta(self, text: str = "", logprobs: tuple[TokenLogprob, ...] = ()) -> Delta:
        """The new text, the new log probabilities of the prompt, and the counts so far."""
        reason: FinishReason | None = None
        if self.finished:
            reason = "stop" if self._ended else "length"
        read, self._read = tuple(self._read), []
        return Delta(
            text, len(self.prompt), self._count, self.cached, reason, logprobs, prompt_logprobs=read
        )

    def read(self, begin: int, logits: Logits) -> None:
        """Computes the log probabilities of prompt tokens.

        Args:
            begin: the position of the first of these logits; they belong to the token after it.
            logits: (positions, vocabulary).
        """
        assert self._prompt_logprobs is not None
        if begin == 0:
            self._read.append(TokenLogprob(self.prompt[0], self._data(self.prompt[0]), None))
        for token, row in zip(self.prompt[begin + 1 :], logits, strict=False):
            self._read.append(token_logprob(token, row, self._prompt_logprobs, self._data))

    def sample(self, logits: Logits) -> Delta:
        """Samples a token from logits, (vocabulary,); appends it and the tokens that the guidance
        forces after it.

        Raises:
            InvalidRequest: the guidance takes too long to follow.
        """
        self._begun = True
        if self.finished:
            # The request is for the prompt alone.
            return self.delta()
        token = self._sample(logits)
        pending = [token, *self._forced(token)]
        cut = pending[: self.limit - self._count]
        self._count += len(cut)
        self._sampler.add(cut)
        stopped = self._matcher is not None and self._matcher.is_stopped and cut == pending
        self._ended = cut[-1] in self._ends or stopped
        self.pending = cut
        text = "".join(self._decode(token) for token in cut if token not in self._ends)
        return self.delta(text, self._logprobs_of(token, logits))

    def _sample(self, logits: Logits) -> int:
        allowed = None if self._matcher is None else self._matcher.allowed(len(logits))
        return self._sampler.sample(logits, allowed)

    def _forced(self, token: int) -> list[int]:
        """Advances the guidance by a token, and returns the tokens that it forces. They fit one
        prefill step, so that other requests do not wait long."""
        if self._matcher is None:
            return []
        self._matcher.consume(token)
        # Log probabilities need a forward pass for each token.
        return [] if self._logprobs is not None else self._matcher.consume_forced(PREFILL_CHUNK)

    def _logprobs_of(self, token: int, logits: Logits) -> tuple[TokenLogprob, ...]:
        if self._logprobs is None or token in self._ends:
            return ()
        return (token_logprob(token, logits, self._logprobs, self._data),)
