"""The decoding that all engines share: chats, prefixes, batches, guidance and scores.

An engine for a runtime adds attention states and forward passes:

    class MyEngine(Decoder[MyStates]):
        def new_states(self, capacity): ...
        def forward(self, tokens, states, keep=1): ...
        def join(self, states, size, former): ...  # only if it batches
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from llm_sidecar.engines.base import (
    ANSWER_TOKENS,
    PROBE,
    Delta,
    GenerationRequest,
    Message,
    prefill_steps,
    softmax,
)
from llm_sidecar.engines.batch import ContinuousBatch, Rows
from llm_sidecar.engines.chat import ChatTokenizer
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.guidance import Grammars
from llm_sidecar.engines.prefixes import Prefix, PrefixCache, S
from llm_sidecar.errors import AdapterRejected


class Decoder(abc.ABC, Generic[S]):
    """An `Engine` on any runtime.

    Attributes:
        batch_capacity: maximum number of requests in a batch.
        model: the runtime's own.
        tokenizer: of the `tokenizers` package, or of transformers if it runs the model.
    """

    runtime: str
    device: str = "cpu"
    batch_capacity: int = 1
    model: Any

    def __init__(self, chat: ChatTokenizer, context_length: int) -> None:
        """Starts without any states.

        Args:
            chat: the model's.
            context_length: maximum number of prompt and completion tokens of a request.
        """
        self.context_length = context_length
        self.tokenizer: Any = chat.tokenizer
        self._chat = chat
        self._grammars = Grammars(chat.tokenizer, chat.ends)
        self._prefixes: PrefixCache[S] = PrefixCache(self.new_states)

    # To be implemented for each runtime

    @abc.abstractmethod
    def new_states(self, capacity: int) -> S:
        """Empty states of one row with at least this capacity, in tokens."""

    @abc.abstractmethod
    def forward(self, tokens: Sequence[int], states: S, keep: int = 1) -> Logits:
        """Processes tokens and adds them to the states of one row.

        Returns:
            logits of the last positions, (keep, vocabulary); undefined if `keep` is 0.
        """

    def join(self, states: Mapping[int, S], size: int, former: Any) -> Rows:
        """Joins rows into one batch; a runtime that batches more than one row overrides this.

        Args:
            states: of all rows, by number, from before they joined a batch.
            size: maximum number of prompt and completion tokens of a row.
            former: the previous result of this method, or None. Its states move to the new rows,
                and it must not be used afterwards.
        """
        raise NotImplementedError

    def borrow(
        self, prompt: Sequence[int], capacity: int
    ) -> contextlib.AbstractContextManager[Prefix[S]]:
        """See `PrefixCache.borrow`."""
        return self._prefixes.borrow(prompt, capacity)

    # Shared by all runtimes; `Engine` has the docstrings

    def tokenize(self, request: GenerationRequest, header: bool = True) -> list[int]:
        return self._chat.prompt(request, self.context_length, header)

    def stream(self, request: GenerationRequest) -> Generator[Delta]:
        batch = self.batch()
        batch.add(0, request)
        try:
            while batch:
                for _, delta in batch.step():
                    yield delta
        finally:
            if batch:
                batch.remove(0)

    def batch(self) -> ContinuousBatch[S]:
        return ContinuousBatch(self)

    def prefill(self, request: GenerationRequest) -> Generator[None]:
        prompt = self.tokenize(request, header=False)
        # Prefilled beside the old prefix, which requests use until this one is complete.
        with self.borrow((), len(prompt) + request.max_tokens) as prefix:
            for _ in self._process(prefix, prompt):
                yield

    def next_token(self, messages: Sequence[Message]) -> tuple[list[int], npt.NDArray[np.float64]]:
        prompt = self.tokenize(GenerationRequest(messages, 1))
        return prompt, softmax(self._logits_after(prompt)[0])

    def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        tokens: Sequence[int] | None = None,
    ) -> dict[str, float]:
        prompt = self.tokenize(GenerationRequest(messages, ANSWER_TOKENS, tokens=tokens))
        tree = self._chat.choice_tree(tuple(choices))
        if tree.branch is None:
            return tree.read(self._logits_after(prompt)[0], None)
        first, second = self._logits_after(prompt, [tree.branch])
        return tree.read(first, second)

    # Called by `ContinuousBatch`

    def start(self, request: GenerationRequest) -> Generation:
        """Starts a completion without tokens.

        Raises:
            InvalidRequest, ModelUnavailable: as in `Engine.tokenize`.
        """
        return Generation(
            request,
            self.tokenize(request),
            decode=self._chat.decoder(),
            ends=self._chat.ends,
            matcher=None if request.guidance is None else self._grammars.matcher(request.guidance),
        )

    def process(self, prefix: Prefix[S], generation: Generation) -> Iterator[Logits | None]:
        """Processes the rest of a prompt; it can be cancelled after each step.

        Yields:
            None after each step but the last; then the logits after the prompt, (1, vocabulary).
        """
        generation.cached = len(prefix.tokens)
        yield from self._process(prefix, generation.prompt)

    def check_adapter(self) -> None:
        """Raises AdapterRejected unless the model's probabilities are finite with its adapter."""
        _, probabilities = self.next_token(PROBE)
        if not np.isfinite(probabilities).all():
            raise AdapterRejected("the model's probabilities are not finite numbers")

    def _logits_after(self, prompt: Sequence[int], more: Sequence[int] = ()) -> Logits:
        """Logits after the prompt and after each of `more`, (1 + tokens of `more`, vocabulary)."""
        with self.borrow(prompt, len(prompt) + len(more)) as prefix:
            *_, logits = self._process(prefix, prompt, more)
        assert logits is not None
        return logits

    def _process(
        self, prefix: Prefix[S], prompt: Sequence[int], more: Sequence[int] = ()
    ) -> Iterator[Logits | None]:
        for start, stop in prefill_steps(len(prefix.tokens), len(prompt)):
            last = stop == len(prompt)
            tokens = [*prompt[start:stop], *(more if last else ())]
            logits = self.forward(tokens, prefix.states, keep=1 + len(more) if last else 0)
            prefix.tokens += prompt[start:stop]
            yield logits if last else None
