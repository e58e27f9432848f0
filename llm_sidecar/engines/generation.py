"""One completion: its tokens, as they are sampled, and their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_sidecar.engines.base import Delta, FinishReason, GenerationRequest, Sampling
from llm_sidecar.engines.sampling import Logits, Sampler

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
        ends: frozenset[int],
        sampling: Sampling,
        matcher: Any = None,
    ) -> None:
        """Starts with no tokens.

        Args:
            request: what to generate.
            prompt: its messages as tokens.
            decode: returns the text that the next token adds.
            ends: tokens that end a turn.
            sampling: how tokens are chosen.
            matcher: a new matcher of llguidance, or None.
        """
        self.prompt = prompt
        self.limit = request.max_tokens
        self.pending: Sequence[int] = ()
        self.cached = 0
        self._decode = decode
        self._ends = ends
        self._matcher = matcher
        self._sampler = Sampler(sampling, prompt, request.seed)
        self._count = 0
        self._ended = False

    @property
    def size(self) -> int:
        """The maximum number of prompt and completion tokens."""
        return len(self.prompt) + self.limit

    @property
    def finished(self) -> bool:
        """Whether the completion is finished."""
        return self._ended or self._count >= self.limit

    def delta(self, text: str = "") -> Delta:
        """The new text, and the counts so far."""
        reason: FinishReason | None = None
        if self.finished:
            reason = "stop" if self._ended else "length"
        return Delta(text, len(self.prompt), self._count, self.cached, reason)

    def sample(self, logits: Logits) -> Delta:
        """Samples a token from logits, (vocabulary,), and appends it with the tokens that must
        follow it."""
        token = self._sample(logits)
        pending = [token]
        if self._matcher is not None:
            self._matcher.consume_token(token)
            pending += self._matcher.compute_ff_tokens()
            self._matcher.consume_tokens(pending[1:])
        cut = pending[: self.limit - self._count]
        self._count += len(cut)
        self._sampler.add(cut)
        stopped = self._matcher is not None and self._matcher.is_stopped() and cut == pending
        self._ended = cut[-1] in self._ends or stopped
        self.pending = cut
        return self.delta("".join(self._decode(token) for token in cut if token not in self._ends))

    def _sample(self, logits: Logits) -> int:
        if self._matcher is None:
            return self._sampler.sample(logits)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little", count=len(logits)))
        return self._sampler.sample(logits, allowed)
