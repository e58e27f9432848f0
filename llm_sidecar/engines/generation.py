"""One completion on torch: what is sampled from logits, and the text that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream

from llm_sidecar.engines.base import Delta, FinishReason, GenerationRequest


class Generation:
    """A completion so far; it does not know where its logits come from.

    Attributes:
        prompt: its tokens.
        pending: tokens that are yet to be read, of which the last one's logits are wanted.
        cached: tokens of the prompt that were read for an earlier one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        *,
        tokenizer: Any,
        ends: frozenset[int],
        matcher: Any,
        device: str,
    ) -> None:
        """Begins with the last token of the prompt.

        Args:
            request: what to generate.
            prompt: its messages as tokens.
            tokenizer: of the tokenizers package.
            ends: tokens that end a turn.
            matcher: llguidance's, at its beginning, or None.
            device: where the logits are.
        """
        self.prompt = prompt
        self.pending: Sequence[int] = prompt[-1:]
        self.cached = 0
        self._limit = request.max_tokens
        self._temperature = request.temperature
        self._tokenizer = tokenizer
        self._ends = ends
        self._matcher = matcher
        self._random = torch.Generator(device)
        if request.seed is None:
            self._random.seed()  # otherwise every generator begins alike
        else:
            self._random.manual_seed(request.seed)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._done = 0
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether nothing is left to sample."""
        return self._ended or self._done >= self._limit

    def delta(self, text: str = "") -> Delta:
        """New text, and the counts so far."""
        reason: FinishReason | None = None
        if self.over:
            reason = "stop" if self._ended else "length"
        return Delta(text, len(self.prompt), self._done, self.cached, reason)

    def take(self, logits: torch.Tensor) -> Delta:
        """Samples a token from its logits, (vocabulary,), and adds those that must follow."""
        token = self._sample(logits)
        pending = [token]
        if self._matcher is not None:
            self._matcher.consume_token(token)
            pending += self._matcher.compute_ff_tokens()
            self._matcher.consume_tokens(pending[1:])
        cut = pending[: self._limit - self._done]
        self._done += len(cut)
        stopped = self._matcher is not None and self._matcher.is_stopped() and cut == pending
        self._ended = cut[-1] in self._ends or stopped
        self.pending = cut
        return self.delta("".join(self._text(token) for token in cut if token not in self._ends))

    def _text(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the package raises bare ones
            # A decoder that joins bytes fails on some that are no text, and is of no use any more.
            self._decoder = DecodeStream(skip_special_tokens=True)
            return "\N{REPLACEMENT CHARACTER}"

    def _sample(self, logits: torch.Tensor) -> int:
        logits = logits.float()
        if self._matcher is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
            padding = (0, logits.shape[-1] - len(allowed))
            mask = torch.from_numpy(np.pad(allowed, padding)).to(logits.device)
            logits = logits.masked_fill(~mask, float("-inf"))
        if self._temperature == 0.0:
            return int(logits.argmax())
        weights = torch.softmax(logits / self._temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=self._random))
