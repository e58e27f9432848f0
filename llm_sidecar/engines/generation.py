"""One completion: what is sampled from logits, and the text that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import Delta, FinishReason, GenerationRequest, softmax

Logits = npt.NDArray[np.float32]


class Generation:
    """A completion so far; it does not know where its logits come from.

    Attributes:
        prompt: its tokens.
        limit: greatest number of completion tokens.
        pending: tokens that are yet to be read, of which the last one's logits are wanted.
        cached: tokens of the prompt that were read for an earlier one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        *,
        decode: Callable[[int], str],
        ends: frozenset[int],
        matcher: Any = None,
    ) -> None:
        """Begins with the last token of the prompt.

        Args:
            request: what to generate.
            prompt: its messages as tokens.
            decode: the text that the next token adds.
            ends: tokens that end a turn.
            matcher: llguidance's, at its beginning, or None.
        """
        self.prompt = prompt
        self.limit = request.max_tokens
        self.pending: Sequence[int] = prompt[-1:]
        self.cached = 0
        self._temperature = request.temperature
        self._decode = decode
        self._ends = ends
        self._matcher = matcher
        self._random = np.random.default_rng(request.seed)
        self._done = 0
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether nothing is left to sample."""
        return self._ended or self._done >= self.limit

    def delta(self, text: str = "") -> Delta:
        """New text, and the counts so far."""
        reason: FinishReason | None = None
        if self.over:
            reason = "stop" if self._ended else "length"
        return Delta(text, len(self.prompt), self._done, self.cached, reason)

    def take(self, logits: Logits) -> Delta:
        """Samples a token from its logits, (vocabulary,), and adds those that must follow."""
        token = self._sample(logits)
        pending = [token]
        if self._matcher is not None:
            self._matcher.consume_token(token)
            pending += self._matcher.compute_ff_tokens()
            self._matcher.consume_tokens(pending[1:])
        cut = pending[: self.limit - self._done]
        self._done += len(cut)
        stopped = self._matcher is not None and self._matcher.is_stopped() and cut == pending
        self._ended = cut[-1] in self._ends or stopped
        self.pending = cut
        return self.delta("".join(self._decode(token) for token in cut if token not in self._ends))

    def _sample(self, logits: Logits) -> int:
        if self._matcher is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little", count=len(logits)).astype(bool)
            logits = np.where(allowed, logits, -np.inf)
        if self._temperature == 0.0:
            return int(logits.argmax())
        bounds = softmax(logits / self._temperature).cumsum()
        return int(bounds.searchsorted(self._random.random() * bounds[-1], side="right"))
